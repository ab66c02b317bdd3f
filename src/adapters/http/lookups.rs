//! Names to addresses, by the system's resolver.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

/// Lookups of one name at a time. Where its name server is dead, each holds a thread for much longer than anybody waits
/// for it, and the threads are the same for all names, the database's too.
const AT_A_TIME: usize = 8;

/// Lookups in all. Tokio has 512 such threads by default.
const IN_ALL: usize = 384;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Lookups {
    /// Of names that are being looked up.
    names: Mutex<BTreeMap<String, Weak<Semaphore>>>,
    all: Arc<Semaphore>,
}

impl Default for Lookups {
    fn default() -> Self {
        Self::of_at_most(IN_ALL)
    }
}

impl Lookups {
    fn of_at_most(lookups: usize) -> Self {
        Self { names: Mutex::default(), all: Arc::new(Semaphore::new(lookups)) }
    }

    /// The addresses of a name.
    pub(super) async fn of(&self, name: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        let host = name.to_owned();
        self.run(name, move || Ok((host.as_str(), port).to_socket_addrs()?.collect())).await
    }

    /// The place of a lookup that nobody waits for any more is taken until it ends.
    async fn run<T: Send + 'static>(
        &self,
        name: &str,
        lookup: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let place = self.places(name).acquire_owned().await.map_err(io::Error::other)?;
        let one_of_all = Arc::clone(&self.all).acquire_owned().await.map_err(io::Error::other)?;
        let looked_up = spawn_blocking(move || {
            let _places = (place, one_of_all);
            lookup()
        });
        looked_up.await.map_err(io::Error::other)?
    }

    fn places(&self, name: &str) -> Arc<Semaphore> {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(places) = names.get(name).and_then(Weak::upgrade) {
            return places;
        }
        names.retain(|_, places| places.strong_count() > 0);
        let places = Arc::new(Semaphore::new(AT_A_TIME));
        names.insert(name.to_owned(), Arc::downgrade(&places));
        places
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_name_that_is_looked_up_for_ever_keeps_threads_for_others() {
        let lookups = Arc::new(Lookups::default());
        let (begun, begins) = mpsc::channel();
        let (end, ends) = mpsc::channel::<()>();
        let ends = Arc::new(Mutex::new(ends));
        let waiting: Vec<_> = (0..AT_A_TIME + 4)
            .map(|_| {
                let (lookups, begun, ends) = (Arc::clone(&lookups), begun.clone(), Arc::clone(&ends));
                tokio::spawn(async move {
                    let lookup = move || {
                        begun.send(()).map_err(io::Error::other)?;
                        let ends = ends.lock().unwrap_or_else(PoisonError::into_inner);
                        ends.recv().map_err(io::Error::other)
                    };
                    lookups.run("dead.example", lookup).await
                })
            })
            .collect();
        for _ in 0..AT_A_TIME {
            // Each task has had its turn by then, so that all that may begin have.
            lookups.run("alive.example", || Ok(())).await.unwrap();
        }
        for task in &waiting {
            task.abort();
        }
        lookups.run("alive.example", || Ok(())).await.unwrap();
        for _ in 0..AT_A_TIME {
            begins.recv().unwrap();
        }
        assert!(begins.try_recv().is_err());
        drop(end);
    }

    #[tokio::test]
    async fn names_that_are_looked_up_for_ever_keep_threads_for_the_database() {
        let lookups = Arc::new(Lookups::of_at_most(3));
        let (begun, begins) = mpsc::channel();
        let (end, ends) = mpsc::channel::<()>();
        let ends = Arc::new(Mutex::new(ends));
        for name in 0..5 {
            let (lookups, begun, ends) = (Arc::clone(&lookups), begun.clone(), Arc::clone(&ends));
            tokio::spawn(async move {
                let lookup = move || {
                    begun.send(()).map_err(io::Error::other)?;
                    ends.lock().unwrap_or_else(PoisonError::into_inner).recv().map_err(io::Error::other)
                };
                lookups.run(&format!("dead{name}.example"), lookup).await
            });
        }
        for _ in 0..5 {
            tokio::task::yield_now().await;
        }
        assert_eq!(lookups.all.available_permits(), 0);
        for _ in 0..3 {
            begins.recv().unwrap();
        }
        spawn_blocking(|| ()).await.unwrap();
        assert!(begins.try_recv().is_err(), "the others wait");
        drop(end);
        for _ in 0..2 {
            spawn_blocking(|| ()).await.unwrap();
        }
        lookups.run("alive.example", || Ok(())).await.unwrap();
    }

    #[tokio::test]
    async fn names_are_looked_up_and_forgotten() {
        let lookups = Lookups::default();
        let addresses = lookups.of("localhost", 80).await.unwrap();
        assert!(addresses.iter().all(|address| address.ip().is_loopback() && address.port() == 80));
        assert!(!addresses.is_empty());
        lookups.run("other.example", || Ok(())).await.unwrap();
        assert_eq!(lookups.names.lock().unwrap().len(), 1);
    }
}
