//! Refusals and failures in the shape that OpenAI's clients read:
//! `{"error": {"message", "type", "param", "code"}}`.
//!
//! A message never repeats what the caller sent: it names the field, the range and the way out.

use std::borrow::Cow;

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use hat_core::InputError;
use serde::Serialize;

use crate::Error;
use crate::error::ErrorKind;

/// Error response to a request.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    /// Stable name for programs, and the reason under which `/metrics` counts it.
    code: &'static str,
    /// The field at fault, as in the JSON.
    param: Option<Cow<'static, str>>,
    message: String,
    retry_after_s: Option<u64>,
    /// True if the connection can't go on: the rest of the request is unread.
    close: bool,
}

/// Marks a response as a refusal, for the counters.
#[derive(Clone, Copy)]
pub(super) struct Refused(pub(super) &'static str);

#[derive(Serialize)]
struct ErrorBody<'a> {
    error: ErrorFields<'a>,
}

#[derive(Serialize)]
struct ErrorFields<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'a str>,
    code: &'static str,
}

impl ApiError {
    /// A refusal with this status.
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { status, code, param: None, message, retry_after_s: None, close: false }
    }

    /// 400: a field has a value that it can't have.
    pub(super) fn field(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_value", message).param(param)
    }

    /// 400: something that others may offer and we don't.
    pub(super) fn unsupported(
        param: impl Into<Cow<'static, str>>,
        message: impl Into<String>,
    ) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "unsupported", message).param(param)
    }

    /// 429: no room now.
    pub(super) fn busy(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "busy", message).retry_after_ms(1000)
    }

    /// Names the field at fault.
    pub(super) fn param(mut self, param: impl Into<Cow<'static, str>>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Adds the time after which to try again; rounded up to seconds.
    pub(super) fn retry_after_ms(mut self, retry_after_ms: u64) -> Self {
        self.retry_after_s = Some(retry_after_ms.div_ceil(1000));
        self
    }

    /// Closes the connection after the response.
    pub(super) fn close(mut self) -> Self {
        self.close = true;
        self
    }

    /// The stable name.
    pub(super) fn code(&self) -> &'static str {
        self.code
    }

    /// The JSON object, in one line.
    pub(super) fn json(&self) -> String {
        let error = ErrorFields {
            message: &self.message,
            r#type: type_of(self.status),
            param: self.param.as_deref(),
            code: self.code,
        };
        serde_json::to_string(&ErrorBody { error }).expect("strings serialise")
    }

    /// The whole response.
    pub(super) fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.json()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.close {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(Refused(self.code));
        response
    }
}

fn type_of(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        status if status.is_server_error() => "server_error",
        _ => "invalid_request_error",
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        let bad = |code| Self::new(StatusCode::BAD_REQUEST, code, message.clone());
        match (&error, error.kind()) {
            (Error::Input(InputError::Field { field, .. }), _) => Self::field(*field, message),
            (Error::Input(InputError::ContextLength { .. }), _) => {
                bad("context_length_exceeded").param("prompt")
            }
            (Error::Template(_), _) => bad("template_error").param("messages"),
            (Error::TemplateHangs(_), _) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "template_error", message)
            }
            (_, ErrorKind::Input) => bad("invalid_value"),
            (_, ErrorKind::Busy) => {
                let retry_after_ms = error.retry_after_ms().unwrap_or(1000);
                Self::busy(message).retry_after_ms(retry_after_ms)
            }
            (_, ErrorKind::Peer) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "cloud_unavailable", message)
                    .retry_after_ms(1000)
            }
            (_, ErrorKind::Resource) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "resource", message)
            }
            (_, ErrorKind::Broken) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "engine_failed", message)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use hat_core::RequestError;

    use super::*;

    #[test]
    fn kinds_become_statuses() {
        let busy = RequestError::Busy { reason: "full".into(), retry_after_ms: 1500 };
        let response = ApiError::from(Error::from(busy)).into_response();
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["retry-after"], "2");
        let peer = RequestError::Peer { peer: "127.0.0.1:1".into(), reason: "away".into() };
        assert_eq!(ApiError::from(Error::from(peer)).into_response().status(), 503);
        let long = Error::from(InputError::ContextLength { prompt: 9, context: 8 });
        let long = ApiError::from(long);
        assert!(long.json().contains(r#""code":"context_length_exceeded""#));
        assert_eq!(long.into_response().status(), 400);
        let broken = ApiError::from(Error::stopped("gone"));
        assert_eq!(broken.into_response().status(), 500);
    }
}
