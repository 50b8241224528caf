//! All sessions, by their keys and by what their devices call them.

use std::collections::BTreeMap;

use hat_transport::conn::ConnectionId;

use super::session::Session;
use crate::sched::SessionKey;

/// Sessions that are open.
#[derive(Default)]
pub(super) struct Sessions {
    by_key: BTreeMap<SessionKey, Session>,
    keys: BTreeMap<(ConnectionId, u32), SessionKey>,
    /// Keys that were given out: none is given twice.
    given: SessionKey,
}

impl Sessions {
    /// Opens a session.
    pub(super) fn insert(&mut self, session: Session) {
        self.given += 1;
        self.keys.insert((session.connection, session.wire_id), self.given);
        self.by_key.insert(self.given, session);
    }

    /// Ends a session.
    pub(super) fn remove(&mut self, key: SessionKey) -> Option<Session> {
        let session = self.by_key.remove(&key)?;
        self.keys.remove(&(session.connection, session.wire_id));
        Some(session)
    }

    /// The session that a device calls `wire_id`, if it is open.
    pub(super) fn key(&self, connection: ConnectionId, wire_id: u32) -> Option<SessionKey> {
        self.keys.get(&(connection, wire_id)).copied()
    }

    /// A session, if it is still open.
    pub(super) fn find(&mut self, key: SessionKey) -> Option<&mut Session> {
        self.by_key.get_mut(&key)
    }

    /// A session that is open.
    ///
    /// # Panics
    /// If it has ended.
    pub(super) fn session(&mut self, key: SessionKey) -> &mut Session {
        self.by_key.get_mut(&key).expect("the session is open")
    }

    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (SessionKey, &Session)> {
        self.by_key.iter().map(|(key, session)| (*key, session))
    }

    pub(super) fn keys(&self) -> Vec<SessionKey> {
        self.by_key.keys().copied().collect()
    }

    /// Keys of a connection's sessions.
    pub(super) fn keys_of(&self, connection: ConnectionId) -> Vec<SessionKey> {
        self.of(connection).collect()
    }

    /// Number of a connection's sessions.
    pub(super) fn count_of(&self, connection: ConnectionId) -> u32 {
        u32::try_from(self.of(connection).count()).expect("session ids are u32")
    }

    /// Frames of a connection that are in chunks whose end has not come: nothing but its device
    /// frees their buffers.
    pub(super) fn begun_frames(&self, connection: ConnectionId) -> usize {
        self.of(connection).map(|key| self.by_key[&key].gathering.frames).sum()
    }

    fn of(&self, connection: ConnectionId) -> impl Iterator<Item = SessionKey> {
        self.keys.range((connection, 0)..=(connection, u32::MAX)).map(|(_, key)| *key)
    }
}
