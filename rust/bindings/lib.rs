//! `turboquant_rs._core`: thin faces over turboquant-core.
//!
//! A face borrows arrays, names their types (`convert`), and enters the core (`enter`). No arithmetic, no loops
//! over elements, no decisions about instruction sets live here.

#![deny(unsafe_code)]

mod allocate;
mod convert;
mod enter;
mod fake_quantize;
mod launch;
mod limits;
mod matmul;
mod memory;
mod philox;
mod planes;
mod quantize;
mod runtime;
mod team;

/// The compiled kernels of turboquant_rs. Private: use `turboquant_rs` itself.
#[pyo3::pymodule]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::allocate::{allocate, ladder};
    #[pymodule_export]
    use crate::fake_quantize::{fake_quantize, fake_quantize_backward, inject_noise};
    #[pymodule_export]
    use crate::launch::Launch;
    #[pymodule_export]
    use crate::limits::{copy_bandwidth, multiply_peak, read_bandwidth};
    #[pymodule_export]
    use crate::matmul::{Product, from_panels, to_panels};
    #[pymodule_export]
    use crate::philox::philox;
    #[pymodule_export]
    use crate::planes::{pack_codes, unpack_codes};
    #[pymodule_export]
    use crate::quantize::{encode, pack, unpack};
    #[pymodule_export]
    use crate::runtime::{active_isa, after_fork, available_isas, compiled_isas, force_isa, version};
    #[pymodule_export]
    use crate::team::share_threads;

    #[pymodule_init]
    fn init(_module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::runtime::obey_environment()
    }
}
