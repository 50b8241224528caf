//! Rows that one stage of a pipeline leaves where the next one can take them.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

/// Rows on their way from one backend to another of the same type, without the host.
///
/// Whoever lends keeps what they are in; it is free again when all copies of this are gone.
pub struct SharedRows(Arc<dyn Any + Send + Sync>);

impl SharedRows {
    /// Lends what `rows` holds.
    #[must_use]
    pub fn new<T: Send + Sync + 'static>(rows: &Arc<T>) -> Self {
        Self(Arc::clone(rows) as _)
    }

    /// The lent value, if it is of this type.
    #[must_use]
    pub fn rows<T: Send + Sync + 'static>(&self) -> Option<&T> {
        self.0.downcast_ref()
    }
}

impl fmt::Debug for SharedRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lent").field(&Arc::strong_count(&self.0)).finish()
    }
}
