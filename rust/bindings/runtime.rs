//! What runs here: instruction sets, threads after a fork, version.

use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;
use turboquant_core as core;

use crate::enter::to_python;

/// Forces one instruction set, by the names of `available_isas`.
const ISA_VARIABLE: &str = "TURBOQUANT_ISA";

/// Name of the instruction set in use.
#[pyfunction]
pub(crate) fn active_isa() -> &'static str {
    core::active_isa()
}

/// Names of the instruction sets that this build has and this CPU can run, best first.
#[pyfunction]
pub(crate) fn available_isas() -> Vec<&'static str> {
    core::available_isas()
}

/// Names of the instruction sets that this build has.
#[pyfunction]
pub(crate) fn compiled_isas() -> Vec<&'static str> {
    core::compiled_isas().to_vec()
}

/// Uses the instruction set `name` from now on; None chooses the best again.
#[pyfunction]
#[pyo3(signature = (name))]
pub(crate) fn force_isa(name: Option<&str>) -> PyResult<()> {
    core::force_isa(name).map_err(to_python)
}

/// Drops the threads that a child process did not inherit; for `os.register_at_fork`.
#[pyfunction]
pub(crate) fn after_fork() {
    core::after_fork();
}

/// Version of the package.
#[pyfunction]
pub(crate) fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Obeys TURBOQUANT_ISA; an instruction set that is not here fails the import.
pub(crate) fn obey_environment() -> PyResult<()> {
    let Some(value) = std::env::var_os(ISA_VARIABLE).filter(|value| !value.is_empty()) else {
        return Ok(());
    };
    let name = value.to_string_lossy();
    core::force_isa(Some(&name)).map_err(|error| PyImportError::new_err(format!("{ISA_VARIABLE}: {error}")))
}
