//! Who may ask at all. Every request passes here before a route is looked up, so that nothing is
//! reachable past it: the right host, no foreign web page, the key.

use std::net::IpAddr;

use axum::http::{HeaderMap, Request, StatusCode, Uri, header};

use super::error::ApiError;
use super::route::Route;

/// The checks, with the key that callers have to know.
pub(super) struct Gate {
    /// Hash of the key: comparing hashes takes the same time whatever the key and its length.
    key: Option<blake3::Hash>,
}

impl Gate {
    pub(super) fn new(api_key: Option<&str>) -> Self {
        Self { key: api_key.map(|key| blake3::hash(key.as_bytes())) }
    }

    /// Lets a request pass.
    ///
    /// # Errors
    /// 400, 403 or 401.
    pub(super) fn check<B>(&self, request: &Request<B>) -> Result<(), ApiError> {
        check_host(request.uri(), request.headers())?;
        check_origin(request.headers())?;
        match Route::of(request.uri().path()) {
            Some(Route::Health) => Ok(()),
            _ => self.check_key(request.headers()),
        }
    }

    fn check_key(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let Some(key) = &self.key else { return Ok(()) };
        let refuse = |message: &str| {
            Err(ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message))
        };
        match single(headers, header::AUTHORIZATION) {
            Some(value) => match bearer(value) {
                Some(given) if blake3::hash(given) == *key => Ok(()),
                _ => refuse("this API key is not the one that the server knows"),
            },
            None => refuse("an API key is needed, in the header `Authorization: Bearer KEY`"),
        }
    }
}

/// A name that resolves to this machine by DNS tricks is not one of this machine's names: a web
/// page of a stranger would reach us under its own name.
fn check_host(uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(host) = single(headers, header::HOST) else {
        let message = "exactly one Host header is needed";
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_host", message));
    };
    let host = std::str::from_utf8(host).unwrap_or_default();
    let target = uri.authority().map_or(host, axum::http::uri::Authority::as_str);
    if is_loopback(host) && is_loopback(target) {
        return Ok(());
    }
    let message = "the Host header names another machine; use localhost, 127.0.0.1 or [::1]";
    Err(ApiError::new(StatusCode::FORBIDDEN, "host_not_allowed", message))
}

/// Browsers say which page asks; only pages of this machine may.
fn check_origin(headers: &HeaderMap) -> Result<(), ApiError> {
    let mut origins = headers.get_all(header::ORIGIN).iter();
    let allowed = |origin: &[u8]| {
        let origin = std::str::from_utf8(origin).unwrap_or_default();
        let authority = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        authority.is_some_and(is_loopback)
    };
    if origins.all(|origin| allowed(origin.as_bytes())) {
        return Ok(());
    }
    let message = "the Origin header names a web page of another machine";
    Err(ApiError::new(StatusCode::FORBIDDEN, "origin_not_allowed", message))
}

/// Whether `host` or `host:port` is this machine by a name that no DNS server decides.
fn is_loopback(authority: &str) -> bool {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((host, "")) => (host, None),
            Some((host, port)) if port.starts_with(':') => (host, Some(&port[1..])),
            _ => return false,
        },
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    if port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return false;
    }
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

/// The value of a header that has to stand there once.
fn single(headers: &HeaderMap, name: header::HeaderName) -> Option<&[u8]> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?;
    values.next().is_none().then_some(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_by_its_own_names() {
        for host in ["localhost", "LOCALHOST:80", "127.0.0.1", "127.9.9.9:1", "[::1]", "[::1]:8080"]
        {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "",
            "evil.com",
            "localhost.evil.com",
            "127.0.0.1.evil.com",
            "127.0.0.1@evil.com",
            "evil.com:80",
            "localhost:x",
            "[::1",
            "[::1]x",
            "[::2]",
            "10.0.0.1",
            "0.0.0.0",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn the_key_is_compared_as_a_whole() {
        let gate = Gate::new(Some("hat-key"));
        let check = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            gate.check_key(&headers).is_ok()
        };
        assert!(check("Bearer hat-key"));
        assert!(check("bearer  hat-key"));
        for wrong in
            ["hat-key", "Bearer", "Bearer ", "Bearer hat-ke", "Bearer hat-keyy", "Basic hat-key"]
        {
            assert!(!check(wrong), "{wrong}");
        }
        assert!(gate.check_key(&HeaderMap::new()).is_err());
    }
}
