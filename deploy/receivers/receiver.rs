//! A receiver of webhooks that verifies signatures and tells duplicates apart.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use standardwebhooks::Webhook;
use tokio::net::TcpListener;

/// Event id to highest token; a table with a unique key in a real receiver.
type Seen = Arc<Mutex<HashMap<String, i64>>>;

fn accept(seen: &Seen, event: &str, token: i64) -> &'static str {
    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    let known = seen.get(event).copied();
    seen.insert(event.to_owned(), known.unwrap_or(token).max(token));
    match known {
        None => "new", // do what the event says, in the transaction that writes its id
        Some(known) if token > known => "duplicate",
        Some(_) => "late duplicate",
    }
}

async fn receive(
    webhook: Arc<Webhook>,
    seen: Seen,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let header = |headers: &HeaderMap, name| Some(headers.get(name)?.to_str().ok()?.to_owned());
    let mut response = Response::default();
    *response.body_mut() = if webhook.verify(&body, &head.headers).is_ok() {
        let event = header(&head.headers, "webhook-id").unwrap_or_default();
        let token = header(&head.headers, "webhook-lease-token").and_then(|token| token.parse().ok());
        accept(&seen, &event, token.unwrap_or(0)).into()
    } else {
        *response.status_mut() = StatusCode::UNAUTHORIZED;
        "bad signature".into()
    };
    Ok(response)
}

/// Receives until the listener fails; `secret` is written `whsec_<base64>`.
pub async fn serve(listener: TcpListener, secret: &str) -> std::io::Result<()> {
    let webhook = Arc::new(Webhook::new(secret).map_err(std::io::Error::other)?);
    let seen = Seen::default();
    loop {
        let (stream, _) = listener.accept().await?;
        let (webhook, seen) = (Arc::clone(&webhook), Arc::clone(&seen));
        tokio::spawn(async move {
            let service = service_fn(|request| receive(Arc::clone(&webhook), Arc::clone(&seen), request));
            // A connection that breaks is the sender's business: it tries again.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}
