//! Delivered events leave the table beside the worker: never in the way of a claim or a settle.

use std::time::Duration;

use tracing::{debug, warn};

use super::store::Store;
use crate::adapters::store::{Page, Retain};

/// The most rows of one transaction.
const PAGE: u32 = 2_000;
/// Between pages of which little could be retired.
const PAUSE: Duration = Duration::from_secs(2);

/// Walks the table until it is dropped. A page that took longer than `store_timeout` is tried again with half its rows.
pub(super) async fn retire(store: Store, retain: Retain, store_timeout: Duration) {
    let mut page = Page { after: 0, rows: PAGE };
    let mut failing = false;
    loop {
        let retired = match tokio::time::timeout(store_timeout, store.retire(retain, page)).await {
            Ok(retired) => retired.map_err(|error| error.to_string()),
            Err(_) => Err(format!("no answer within store_timeout ({store_timeout:?})")),
        };
        match retired {
            Ok(retired) => {
                debug!(events = retired.events, after = page.after, "retired delivered events");
                let most = retired.events >= u64::from(page.rows / 2).max(1);
                page = Page { after: retired.next, rows: page.rows.saturating_mul(2).min(PAGE) };
                failing = false;
                if most {
                    continue;
                }
            }
            Err(error) => {
                if !failing {
                    warn!(error, "delivered events could not be retired; trying again");
                }
                page.rows = (page.rows / 2).max(1);
                failing = true;
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}
