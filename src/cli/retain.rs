//! Delivered events leave the table beside the worker: never in the way of a claim or a settle.

use std::future::Future;
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::store::Store;
use crate::adapters::store::{Page, Retain, StoreError};
use crate::adapters::telemetry::Failures;

/// The most rows of one transaction.
const PAGE: u32 = 2_000;
/// Between pages of which little could be retired.
const PAUSE: Duration = Duration::from_secs(2);

/// Walks the table until it is dropped. A page that failed, or took longer than `store_timeout`, is tried
/// again with half its rows.
pub(super) async fn retire(store: Store, retain: Retain, store_timeout: Duration) {
    let mut page = Page { after: 0, rows: PAGE };
    let (mut retiring, mut dropping) = (Trial::default(), Trial::default());
    let mut keeping = Failures::default();
    loop {
        if let Retain::Archive(keep_for) = retain
            && page.after == 0
        {
            // A day that can't be dropped keeps nothing else from leaving the queue.
            const FAILED: &str = "a day of the archive could not be dropped; trying again";
            dropping.of(FAILED, store_timeout, store.drop_days(keep_for)).await;
        }
        const FAILED: &str = "delivered events could not be retired; trying again";
        match retiring.of(FAILED, store_timeout, store.retire(retain, page)).await {
            Some(retired) => {
                debug!(events = retired.events, after = page.after, "retired delivered events");
                if let Some(kept) = retired.kept
                    && keeping.another(Instant::now()).1
                {
                    warn!(kept, "delivered events stay in the table: the database does not let them go");
                }
                let most = retired.events >= u64::from(page.rows / 2).max(1);
                page = Page { after: retired.next, rows: page.rows.saturating_mul(2).min(PAGE) };
                if most {
                    continue;
                }
            }
            None => page.rows = (page.rows / 2).max(1),
        }
        sleep(PAUSE).await;
    }
}

/// Something that is tried again and again.
#[derive(Default)]
struct Trial {
    failures: Failures,
}

impl Trial {
    async fn of<T>(
        &mut self,
        failed: &'static str,
        bound: Duration,
        call: impl Future<Output = Result<T, StoreError>>,
    ) -> Option<T> {
        let error = match timeout(bound, call).await {
            Ok(Ok(done)) => {
                self.failures = Failures::default();
                return Some(done);
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within store_timeout ({bound:?})"),
        };
        let (failures, aloud) = self.failures.another(Instant::now());
        if aloud {
            warn!(error, failures, "{failed}");
        }
        None
    }
}
