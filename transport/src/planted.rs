//! Faults that a test plants to see that it finds them. Without the feature `testkit` there are
//! none.

/// Something that is done wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Bytes of a socket that its device has left still count.
    NoFence,
    /// A link goes on in an epoch that is not its peer's.
    StaleEpoch,
    /// A replay leaves its first frame out.
    LateReplay,
    /// Credit does not come back when a frame is dropped.
    KeptCredit,
    /// A session gives its pages back twice.
    PagesTwice,
    /// A commit is applied when it comes, before the rows that wait have run.
    EarlyCommit,
    /// A session that was evicted is not opened again.
    IgnoredEviction,
    /// A draft stands one row behind those that were reserved.
    RowBeyond,
}

/// The fault of an endpoint or of a role, if it has one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Planted {
    #[cfg(feature = "testkit")]
    fault: Option<Fault>,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::NoFence,
        Self::StaleEpoch,
        Self::LateReplay,
        Self::KeptCredit,
        Self::PagesTwice,
        Self::EarlyCommit,
        Self::IgnoredEviction,
        Self::RowBeyond,
    ];
}

impl Planted {
    /// This fault.
    #[cfg(feature = "testkit")]
    #[must_use]
    pub const fn new(fault: Fault) -> Self {
        Self { fault: Some(fault) }
    }

    /// True if it is this one.
    #[must_use]
    pub fn is(self, fault: Fault) -> bool {
        #[cfg(feature = "testkit")]
        return self.fault == Some(fault);
        #[cfg(not(feature = "testkit"))]
        {
            let _ = fault;
            false
        }
    }
}
