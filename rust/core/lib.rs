//! The core of turboquant-rs: tensors to stacks of bit planes and back.
//!
//! ```text
//!  tensor ── scheme ──► scale, zero point ─┐
//!    │                  (quantize.rs)      ▼
//!    └──────────────► codes ──► planes ──► packed blob ──► unpack ──► tensor
//!        philox.rs ──►  ▲      (planes.rs)            └──► matmul ──► tensor
//!        (rounding)  quantize.rs                           (matmul.rs)
//! ```
//!
//! Beside it stands [`allocate()`], which decides how many bits each tensor of many gets.
//!
//! Every algorithm is written once over [`simd::Isa`] and runs on the best instruction set of the CPU;
//! results are the same bits on all of them, for any number of threads.
//! No Python, no files, no environment, no printing.

#![deny(unsafe_code)]

mod allocate;
mod error;
mod fake_quantize;
mod limits;
mod matmul;
mod parallel;
mod philox;
mod planes;
mod quantize;
mod scheme;
pub mod simd;

#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

pub use allocate::{Choices, allocate, ladder};
pub use error::Error;
pub use fake_quantize::{fake_quantize, fake_quantize_backward};
pub use limits::{copy_bandwidth, multiply_peak, read_bandwidth};
pub use matmul::{Activations, Layout, from_panels, matmul, matmul_refined, panels_nbytes, to_panels};
pub use parallel::{Team, after_fork, lend_team};
pub use philox::philox;
pub use planes::{pack_codes, unpack_codes};
pub use quantize::{
    MSE_MULTIPLES, Numbers, Scales, ScalesMut, Source, Target, ZeroPoints, ZeroPointsMut, encode,
    inject_noise, pack, unpack,
};
pub use scheme::{MAX_PLANES, Mode, Planes, Rounding, ScaleDtype, ScaleRule, Scheme, Table};
pub use simd::{active_isa, available_isas, compiled_isas, force_isa};

/// A tensor seen as `rows` rows of `k` elements, row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Number of rows.
    pub rows: usize,
    /// Length of a row.
    pub k: usize,
}

impl Shape {
    /// Number of elements.
    pub fn len(self) -> usize {
        self.rows * self.k
    }

    /// Whether there is no element.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Refuses a buffer `name` whose length is not `need`.
    pub(crate) fn check(self, name: &'static str, got: usize, need: usize) -> Result<(), Error> {
        if got == need {
            return Ok(());
        }
        Err(Error::Length { name, got, need, rows: self.rows, k: self.k })
    }
}
