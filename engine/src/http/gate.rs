//! The checks that every request passes before a route is looked up, so that nothing is reachable
//! past them: the right host, no foreign web page, the key. A browser asks first, without the key,
//! whether a page may (a preflight, as the Fetch standard has it); that is answered here, too.

use std::net::IpAddr;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header};

use super::HttpConfig;
use super::error::ApiError;
use super::route::Route;
use crate::Error;

/// The checks, with the key that callers have to know.
pub(super) struct Gate {
    /// Hash of the key: comparing hashes takes the same time whatever the key and its length.
    key: Option<blake3::Hash>,
    /// Names of this machine beside the loopback ones, with or without a port.
    hosts: Vec<String>,
    /// True if the file of a Unix socket decides who may ask: no web page reaches it, so any name
    /// will do.
    any_host: bool,
    /// Origins of web pages beside those of this machine.
    origins: Vec<String>,
}

/// A request that passed.
pub(super) enum Passed {
    /// One for a route.
    Request,
    /// A browser's question before one, with its answer.
    Preflight(Response<Body>),
}

/// Refuses lists that could match nothing, or everything.
///
/// # Errors
/// [`Error::Input`], `allow_host` or `allow_origin`.
pub(super) fn check_lists(hosts: &[String], origins: &[String]) -> Result<(), Error> {
    for host in hosts {
        let name = host.split_once(':').map_or(host.as_str(), |(name, _)| name);
        let port = host.split_once(':').map(|(_, port)| port.parse::<u16>().is_ok());
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        if name.is_empty() || !name.bytes().all(plain) || port == Some(false) {
            let reason = format!("{host:?} is no NAME or NAME:PORT");
            return Err(Error::field("allow_host", reason));
        }
    }
    for origin in origins {
        let rest = origin.split_once("://").map(|(_, rest)| rest);
        let plain = |b: u8| b.is_ascii_graphic() && !matches!(b, b'*' | b',' | b'/' | b'@');
        if !rest.is_some_and(|rest| !rest.is_empty() && rest.bytes().all(plain)) {
            let reason = format!(
                "{origin:?} is no origin: write scheme://host or scheme://host:port, without a \
                 path, as the browser sends it; * and null would let every page in"
            );
            return Err(Error::field("allow_origin", reason));
        }
    }
    Ok(())
}

impl Gate {
    pub(super) fn new(config: &HttpConfig) -> Self {
        Self {
            key: config.api_key.as_deref().map(|key| blake3::hash(key.as_bytes())),
            hosts: config.allow_hosts.clone(),
            any_host: config.unix.is_some(),
            origins: config.allow_origins.clone(),
        }
    }

    /// Lets a request pass.
    ///
    /// # Errors
    /// 400, 403 or 401.
    pub(super) fn check<B>(&self, request: &Request<B>) -> Result<Passed, ApiError> {
        self.check_host(request.uri(), request.headers())?;
        self.check_origin(request.headers())?;
        let route = Route::of(request.uri().path());
        let headers = request.headers();
        let asks_first = *request.method() == Method::OPTIONS
            && headers.contains_key(header::ORIGIN)
            && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
        match route {
            Some(route) if asks_first => Ok(Passed::Preflight(preflight(route, headers))),
            Some(route) if route.is_open() => Ok(Passed::Request),
            _ => self.check_key(headers).map(|()| Passed::Request),
        }
    }

    /// The origin of the page that asks, if there is exactly one and it may.
    pub(super) fn allowed_origin(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        let origin = single(headers, header::ORIGIN)?;
        self.allows(origin).then(|| HeaderValue::from_bytes(origin).expect("it came as a header"))
    }

    fn allows(&self, origin: &[u8]) -> bool {
        let origin = std::str::from_utf8(origin).unwrap_or_default();
        let authority = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        authority.is_some_and(is_loopback)
            || self.origins.iter().any(|allowed| allowed.eq_ignore_ascii_case(origin))
    }

    /// True if a `Host` value names this machine.
    fn is_here(&self, authority: &str) -> bool {
        let name = authority.split_once(':').map_or(authority, |(name, _)| name);
        let listed =
            |host: &String| host.eq_ignore_ascii_case(authority) || host.eq_ignore_ascii_case(name);
        is_loopback(authority) || self.hosts.iter().any(listed)
    }

    /// A name that resolves to this machine by DNS tricks is not one of this machine's names: a
    /// foreign web page would reach us under its own name.
    fn check_host(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
        let Some(host) = single(headers, header::HOST) else {
            let message = "exactly one Host header is needed";
            return Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_host", message));
        };
        let host = std::str::from_utf8(host).unwrap_or_default();
        let target = uri.authority().map_or(host, axum::http::uri::Authority::as_str);
        if self.any_host || (self.is_here(host) && self.is_here(target)) {
            return Ok(());
        }
        let message = "the Host header names another machine; use localhost, 127.0.0.1 or [::1], \
                       or start the device with --allow-host NAME";
        Err(ApiError::new(StatusCode::FORBIDDEN, "host_not_allowed", message))
    }

    /// Browsers say which page asks; only pages of this machine and those that are listed may.
    fn check_origin(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let mut origins = headers.get_all(header::ORIGIN).iter();
        if origins.all(|origin| self.allows(origin.as_bytes())) {
            return Ok(());
        }
        let message = "the Origin header names a web page of another machine; \
                       --allow-origin lets one in";
        Err(ApiError::new(StatusCode::FORBIDDEN, "origin_not_allowed", message))
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

/// Methods and headers that a page may use, for the browser that asks before it lets the page.
fn preflight(route: Route, asked: &HeaderMap) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    let method = HeaderValue::from_static(route.method());
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, method);
    let wanted = asked.get_all(header::ACCESS_CONTROL_REQUEST_HEADERS).iter();
    let wanted = wanted.filter_map(|value| value.to_str().ok()).flat_map(|names| names.split(','));
    let own = wanted.map(str::trim).filter(|name| is_own_header(name)).take(REQUEST_HEADERS_MAX);
    let names = own.fold("authorization, content-type".to_owned(), |names, name| {
        format!("{names}, {}", name.to_ascii_lowercase())
    });
    let names = HeaderValue::from_str(&names).expect("letters, digits and dashes");
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, names);
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    if asked.contains_key("access-control-request-private-network") {
        let yes = HeaderValue::from_static("true");
        headers.insert("access-control-allow-private-network", yes);
    }
    response
}

/// Most headers that one preflight is granted.
const REQUEST_HEADERS_MAX: usize = 64;

/// True if a page may send this header: one that clients of this API add by themselves.
fn is_own_header(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    let plain = lower.len() <= 64 && lower.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    let known = ["accept", "cache-control", "idempotency-key", "user-agent"];
    plain
        && (lower.starts_with("x-")
            || lower.starts_with("openai-")
            || known.contains(&lower.as_str()))
}

/// Lets the page of `origin` read a response, and the headers that are ours.
pub(super) fn let_read(origin: HeaderValue, headers: &mut HeaderMap) {
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.append(header::VARY, HeaderValue::from_static("Origin"));
    let ours = HeaderValue::from_static("x-request-id, x-hat-ignored, x-hat-sampling, retry-after");
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, ours);
}

/// True if `host` or `host:port` is this machine by a name that no DNS server decides.
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
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "127.0.0.1@evil.example",
            "evil.example:80",
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
    fn lists_are_exact() {
        let mut config = HttpConfig::new(([127, 0, 0, 1], 0).into());
        config.allow_hosts = vec!["host.docker.internal".into(), "box:8080".into()];
        config.allow_origins = vec!["app://obsidian.md".into(), "vscode-webview://abc".into()];
        check_lists(&config.allow_hosts, &config.allow_origins).unwrap();
        let gate = Gate::new(&config);
        for host in ["host.docker.internal", "HOST.docker.internal:1234", "box:8080", "[::1]:1"] {
            assert!(gate.is_here(host), "{host}");
        }
        for host in ["box", "box:80", "docker.internal", "x.host.docker.internal", ""] {
            assert!(!gate.is_here(host), "{host}");
        }
        for origin in ["app://obsidian.md", "vscode-webview://abc", "http://localhost:5173"] {
            assert!(gate.allows(origin.as_bytes()), "{origin}");
        }
        for origin in ["null", "app://abc", "app://obsidian.md:8443", "app://x", ""] {
            assert!(!gate.allows(origin.as_bytes()), "{origin}");
        }
        for host in ["", "*", "a b", "box:", "box:x", "box:99999", "app://box", "[::1]"] {
            assert!(check_lists(&[host.into()], &[]).is_err(), "{host}");
        }
        for origin in ["", "*", "null", "app://", "app://*", "app://a/", "a.example", "x://a@b"] {
            assert!(check_lists(&[], &[origin.into()]).is_err(), "{origin}");
        }
    }

    #[test]
    fn the_key_is_compared_as_a_whole() {
        let config = HttpConfig::new(([127, 0, 0, 1], 0).into()).api_key("hat-key");
        let gate = Gate::new(&config);
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
