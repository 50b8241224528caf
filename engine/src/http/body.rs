//! The body of a request, within a size and a time.

use std::pin::Pin;
use std::sync::Arc;

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use hyper::body::Body as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::HttpLimits;
use super::error::ApiError;

/// Bytes that a body may have without one of the places for large ones.
const SMALL_BYTES: usize = 64 << 10;

/// A body, with its place among the large ones if it is one.
pub(super) struct ReadBody {
    /// The bytes.
    pub(super) bytes: Vec<u8>,
    _place: Option<OwnedSemaphorePermit>,
}

/// Reads the whole body. Memory grows with what has arrived, not with what was announced; bodies
/// beyond [`SMALL_BYTES`] need one of the places of `large`.
///
/// # Errors
/// 413 beyond the limit, 408 if it does not arrive in time, 400 if its chunks are broken, 429 if
/// too many large bodies are in memory.
pub(super) async fn read(
    request: Request<Body>,
    limits: &HttpLimits,
    large: &Arc<Semaphore>,
) -> Result<ReadBody, ApiError> {
    let too_large = || {
        let message = format!("the body is larger than {} bytes", limits.body_bytes_max);
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message).close()
    };
    let announced = request.headers().get(header::CONTENT_LENGTH);
    let announced = announced.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|bytes| bytes > limits.body_bytes_max) {
        return Err(too_large());
    }
    let mut body = request.into_body();
    let collect = async {
        let mut bytes = Vec::new();
        let mut place = None;
        while let Some(frame) = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await
        {
            let frame = frame.map_err(|_| {
                let message = "the body broke off, or its chunks are malformed";
                ApiError::new(StatusCode::BAD_REQUEST, "broken_body", message).close()
            })?;
            let Ok(data) = frame.into_data() else {
                continue;
            }; // trailers
            if bytes.len() + data.len() > limits.body_bytes_max {
                return Err(too_large());
            }
            if bytes.len() + data.len() > SMALL_BYTES && place.is_none() {
                let found = large.clone().try_acquire_owned();
                let full = |_| ApiError::busy("too many large bodies are in memory").close();
                place = Some(found.map_err(full)?);
            }
            bytes.extend_from_slice(&data);
        }
        Ok(ReadBody { bytes, _place: place })
    };
    tokio::time::timeout(limits.body_timeout, collect).await.unwrap_or_else(|_| {
        let message = "the body did not arrive in time";
        Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", message).close())
    })
}
