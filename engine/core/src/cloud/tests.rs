//! Histories of a cloud in virtual time: devices that speak by hand, steps that run when the test
//! says so, and a model whose rows tell which rows they saw.

mod bed;
mod faults;
mod histories;
mod ledger;
mod room;
mod schedule;
