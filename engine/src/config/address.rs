//! The address of a role: a host and a port, read by one set of rules wherever one is given.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr as _;

use dns_lookup::{AddrInfoHints, LookupErrorKind, SockType, getaddrinfo};

use crate::Error;

/// Longest host name, by RFC 1035.
const NAME_BYTES_MAX: usize = 253;
/// Longest part of a host name between its dots.
const LABEL_BYTES_MAX: usize = 63;

/// A host and a port: `HOST`, `HOST:PORT`, `:PORT` or `PORT`, where a host is an IPv4 address, an
/// IPv6 address in brackets, or a name. Without a host it is this machine, 127.0.0.1.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    host: Host,
    port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Host {
    Ip(IpAddr),
    Name(String),
}

/// A text that is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no address: {reason}")]
pub struct AddressError {
    text: String,
    reason: String,
}

/// A host that can't be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Unresolved {
    reason: String,
    /// True if asking again gives the same answer.
    pub is_final: bool,
}

impl Address {
    /// The port of a cloud where an address has none.
    pub const CLOUD_PORT: u16 = 7433;
    /// The port of the HTTP API where an address has none.
    pub const HTTP_PORT: u16 = 8080;

    /// Reads an address; `port` is the port of one that has none.
    ///
    /// # Errors
    /// The part that is wrong, and what would be right.
    pub fn parse(text: &str, port: u16) -> Result<Self, AddressError> {
        let wrong = |reason: String| AddressError { text: text.to_owned(), reason };
        if text.is_empty() {
            return Err(wrong(format!(
                "it is empty, and HOST or HOST:PORT is wanted, as {EXAMPLE}"
            )));
        }
        if text.contains("://") {
            return Err(wrong(format!(
                "HOST:PORT alone is wanted, as {EXAMPLE}, without a scheme"
            )));
        }
        if let Some(rest) = text.strip_prefix('[') {
            let (inner, rest) =
                rest.split_once(']').ok_or_else(|| wrong("no ] ends the [".into()))?;
            let ip = Ipv6Addr::from_str(inner);
            let ip = ip.map_err(|_| wrong(format!("{inner:?} is no IPv6 address")))?;
            let port = match rest.strip_prefix(':') {
                Some(given) => parse_port(given).map_err(wrong)?,
                None if rest.is_empty() => port,
                None => return Err(wrong("after the ] nothing or :PORT is wanted".into())),
            };
            return Ok(Self { host: Host::Ip(ip.into()), port });
        }
        if text.bytes().filter(|byte| *byte == b':').count() > 1 {
            return Err(wrong("an IPv6 address stands in brackets, as [::1]:7433".into()));
        }
        let (host, given) = match text.split_once(':') {
            Some((host, given)) => (host, Some(given)),
            None if text.bytes().all(|byte| byte.is_ascii_digit()) => ("", Some(text)),
            None => (text, None),
        };
        let port = given.map_or(Ok(port), parse_port).map_err(wrong)?;
        Ok(Self { host: Host::parse(host).map_err(wrong)?, port })
    }

    /// Refuses an address that is not of this machine, as long as there is no TLS. A name passes:
    /// [`Address::resolve`] looks at what it stands for.
    ///
    /// # Errors
    /// [`Error::Input`] with the way between machines.
    pub fn check_local(&self, field: &'static str) -> Result<(), Error> {
        match &self.host {
            Host::Ip(ip) => check_loopback(field, *ip),
            Host::Name(_) => Ok(()),
        }
    }

    /// Refuses port 0, which only a listener can have.
    ///
    /// # Errors
    /// [`Error::Input`].
    pub fn check_port(&self, field: &'static str) -> Result<(), Error> {
        match self.port {
            0 => Err(Error::field(field, format!("{self}: nobody listens at port 0"))),
            _ => Ok(()),
        }
    }

    /// True if [`Address::resolve`] needs no name server.
    pub(crate) fn is_ip(&self) -> bool {
        matches!(self.host, Host::Ip(_))
    }

    /// The first of the host's addresses that is of this machine.
    ///
    /// # Errors
    /// Reason that there is none, and the chance of a change.
    pub fn resolve(&self) -> Result<SocketAddr, Unresolved> {
        let found = match &self.host {
            Host::Ip(ip) => vec![*ip],
            Host::Name(name) => lookup(name)?,
        };
        let local = found.iter().find(|ip| ip.is_loopback());
        match (local, found.first()) {
            (Some(ip), _) => Ok(SocketAddr::new(*ip, self.port)),
            (None, Some(ip)) => {
                let reason = format!("{self} stands for {ip}: {NO_TLS}");
                Err(Unresolved { reason, is_final: true })
            }
            (None, None) => {
                let reason = format!("the host of {self} has no address");
                Err(Unresolved { reason, is_final: true })
            }
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(ip) => SocketAddr::new(*ip, self.port).fmt(f),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

impl Host {
    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self::Ip(Ipv4Addr::LOCALHOST.into()));
        }
        if let Ok(ip) = Ipv4Addr::from_str(text) {
            return Ok(Self::Ip(ip.into()));
        }
        let name = text.strip_suffix('.').unwrap_or(text);
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let is_label = |label: &str| {
            (1..=LABEL_BYTES_MAX).contains(&label.len()) && label.bytes().all(is_plain)
        };
        if name.len() > NAME_BYTES_MAX || !name.split('.').all(is_label) {
            return Err(format!("{text:?} is no host name and no IPv4 address"));
        }
        // The system would take 127.1 or 0x7f.1 for an IPv4 address, and 1.2.3 for 1.2.0.3.
        let last = name.rsplit('.').next().unwrap_or(name).to_ascii_lowercase();
        let digits = last.strip_prefix("0x").unwrap_or(&last);
        let is_number = last.bytes().all(|byte| byte.is_ascii_digit())
            || (digits.len() < last.len() && digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
        if is_number {
            return Err(format!("{text:?} is no IPv4 address: four numbers to 255 are wanted"));
        }
        Ok(Self::Name(name.to_ascii_lowercase()))
    }
}

/// An address that passes everywhere, for messages.
const EXAMPLE: &str = "127.0.0.1:7433";
const NO_TLS: &str = "another machine, and there is no TLS yet: use 127.0.0.1, and a tunnel \
    (ssh -L) between machines";

/// Refuses an address of other machines, or one that they can reach.
///
/// # Errors
/// [`Error::Input`] with the way between machines.
pub(crate) fn check_loopback(field: &'static str, ip: IpAddr) -> Result<(), Error> {
    if ip.is_loopback() {
        return Ok(());
    }
    let reason = format!(
        "{ip} is not of this machine alone, and there is no TLS yet: use 127.0.0.1, and a tunnel \
         (ssh -L) between machines"
    );
    Err(Error::field(field, reason))
}

fn parse_port(text: &str) -> Result<u16, String> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    let port = is_number.then(|| text.parse().ok()).flatten();
    port.ok_or_else(|| format!("port {text:?} is no number from 0 to 65535"))
}

/// All addresses of a name. `localhost` and what ends in it is this machine, and `.invalid` is
/// nowhere, whatever a server says (RFC 6761).
fn lookup(name: &str) -> Result<Vec<IpAddr>, Unresolved> {
    let is_below = |top: &str| name == top || name.ends_with(&format!(".{top}"));
    if is_below("localhost") {
        return Ok(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]);
    }
    if is_below("invalid") {
        return Err(unknown(name, "the name stands for no host"));
    }
    let hints = AddrInfoHints { socktype: SockType::Stream.into(), ..AddrInfoHints::default() };
    let found = getaddrinfo(Some(name), None, Some(hints))
        .map_err(|error| failed(name, error.kind(), &std::io::Error::from(error)))?;
    Ok(found.filter_map(Result::ok).map(|found| found.sockaddr.ip()).collect())
}

fn failed(name: &str, kind: LookupErrorKind, error: &std::io::Error) -> Unresolved {
    match kind {
        LookupErrorKind::NoName | LookupErrorKind::NoData => unknown(name, "no such host"),
        kind => {
            let is_final = matches!(kind, LookupErrorKind::Fail);
            Unresolved { reason: format!("looking up {name}: {error}"), is_final }
        }
    }
}

fn unknown(name: &str, why: &str) -> Unresolved {
    Unresolved { reason: format!("{name} is unknown: {why}"), is_final: true }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shown(text: &str) -> String {
        Address::parse(text, 7433).unwrap().to_string()
    }

    #[test]
    fn every_form_has_its_defaults() {
        for (text, address) in [
            ("127.0.0.1", "127.0.0.1:7433"),
            ("127.0.0.1:80", "127.0.0.1:80"),
            ("localhost", "localhost:7433"),
            ("LocalHost.:8080", "localhost:8080"),
            ("box_1.lan:65535", "box_1.lan:65535"),
            (":8080", "127.0.0.1:8080"),
            ("8080", "127.0.0.1:8080"),
            ("0", "127.0.0.1:0"),
            ("[::1]", "[::1]:7433"),
            ("[::1]:80", "[::1]:80"),
            ("10.0.0.2", "10.0.0.2:7433"),
            ("3com.example", "3com.example:7433"),
            ("xn--bcher-kva.example", "xn--bcher-kva.example:7433"),
        ] {
            assert_eq!(shown(text), address, "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let long = format!("{}.example", "a".repeat(64));
        for (text, words) in [
            ("", "empty"),
            ("http://127.0.0.1:8080", "scheme"),
            ("::1", "brackets"),
            ("::1:7433", "brackets"),
            ("1:2:3", "brackets"),
            ("[::1", "]"),
            ("[::1]7433", ":PORT"),
            ("[::1]:", "port"),
            ("[127.0.0.1]:80", "IPv6"),
            ("[fe80::1%eth0]", "IPv6"),
            ("localhost:", "port \"\""),
            ("localhost:http", "port \"http\""),
            ("localhost:+80", "port \"+80\""),
            ("localhost:65536", "65535"),
            ("65536", "65535"),
            ("999999999999999999999999", "65535"),
            ("256.0.0.1", "IPv4"),
            ("127.1", "IPv4"),
            ("1.2.3.4.5:80", "IPv4"),
            ("0x7f.0x1", "IPv4"),
            ("a b", "host name"),
            (" localhost", "host name"),
            ("a..b", "host name"),
            (".", "host name"),
            ("münchen.example", "host name"),
            ("user@box", "host name"),
            (&long, "host name"),
            ("unix:/run/x", "port"),
        ] {
            let error = Address::parse(text, 7433).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains(&format!("{text:?}")), "{error}");
        }
    }

    #[test]
    fn other_machines_are_refused_and_names_are_looked_at_later() {
        for text in ["127.0.0.1", "127.9.9.9", "[::1]", "box.example", "localhost"] {
            Address::parse(text, 1).unwrap().check_local("cloud").unwrap();
        }
        for text in ["10.0.0.2", "0.0.0.0", "[::]", "[2001:db8::1]", "169.254.1.1"] {
            let address = Address::parse(text, 1).unwrap();
            let error = address.check_local("cloud").unwrap_err().to_string();
            assert!(error.starts_with("cloud: ") && error.contains("ssh -L"), "{error}");
            assert!(address.resolve().unwrap_err().is_final);
        }
        let error = Address::parse("0", 1).unwrap().check_port("cloud").unwrap_err().to_string();
        assert!(error.contains("port 0"), "{error}");
    }

    #[test]
    fn names_that_no_server_decides_are_known() {
        let at = |text| Address::parse(text, 7433).unwrap().resolve();
        assert_eq!(at("localhost:80").unwrap().to_string(), "127.0.0.1:80");
        assert_eq!(at("cloud.localhost").unwrap().to_string(), "127.0.0.1:7433");
        let error = at("nowhere.invalid").unwrap_err();
        assert!(error.is_final && error.to_string().contains("nowhere.invalid"), "{error}");
    }

    #[test]
    fn a_name_that_a_server_does_not_know_is_final_and_a_server_that_is_away_is_not() {
        for (kind, is_final) in [
            (LookupErrorKind::NoName, true),
            (LookupErrorKind::NoData, true),
            (LookupErrorKind::Fail, true),
            (LookupErrorKind::Again, false),
            (LookupErrorKind::System, false),
        ] {
            let error = failed("box.example", kind, &std::io::Error::other("said so"));
            assert_eq!(error.is_final, is_final, "{kind:?}");
            assert!(error.to_string().contains("box.example"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_an_address_or_an_error(text in "[0-9a-z:.\\[\\]%/ -]{0,24}|\\PC{0,12}") {
            if let Ok(address) = Address::parse(&text, 7433) {
                let shown = address.to_string();
                prop_assert_eq!(Address::parse(&shown, 1), Ok(address), "{}", shown);
            }
        }
    }
}
