//! The one door from Python into the core.

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use turboquant_core::Error;

/// Runs `work` with the interpreter released and turns its error into a Python exception.
///
/// Everything `work` touches has been borrowed before: it sees slices, never Python objects.
pub(crate) fn enter<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T, Error> + Send) -> PyResult<T> {
    py.detach(work).map_err(to_python)
}

/// The Python exception of an error of the core: TypeError for wrong element types, else ValueError.
pub(crate) fn to_python(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::Kind { .. } => PyTypeError::new_err(message),
        _ => PyValueError::new_err(message),
    }
}
