//! Kernels of a GPU, launched by its driver.

#![expect(unsafe_code, reason = "a function of the driver's library, which Python has loaded")]

use std::ffi::{c_int, c_uint, c_void};
use std::ptr;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::enter::enter;

/// Arguments of a launch, at most.
const MOST_ARGUMENTS: usize = 128;

/// `cuLaunchKernelEx` of cuda.h.
type Driver = unsafe extern "system" fn(
    config: *const Config,
    function: usize,
    arguments: *const *const i64,
    extra: *const *const c_void,
) -> c_int;

/// CUlaunchConfig.
#[repr(C)]
struct Config {
    sizes: [c_uint; 7],
    stream: usize,
    attributes: *const Attribute,
    count: c_uint,
}

/// CUlaunchAttribute: what it is and, at a multiple of 8 bytes, 64 bytes for its value.
#[repr(C)]
struct Attribute {
    id: c_uint,
    value: [u64; 8],
}

/// CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: the kernel in front need not have ended.
static EARLY: Attribute = Attribute { id: 6, value: [1, 0, 0, 0, 0, 0, 0, 0] };

/// A kernel with its sizes: all of a launch that stays the same.
#[pyclass(frozen, module = "turboquant_rs._core")]
pub(crate) struct Launch {
    driver: Driver,
    function: usize,
    sizes: [c_uint; 7],
    early: bool,
}

#[pymethods]
impl Launch {
    #[new]
    fn new(driver: usize, function: usize, sizes: [c_uint; 7], early: bool) -> PyResult<Self> {
        if driver == 0 {
            return Err(PyValueError::new_err("the driver's cuLaunchKernelEx is at no address"));
        }
        // SAFETY: the caller gives the address of this very function, of a library that is never closed.
        #[expect(clippy::disallowed_methods, reason = "the only way from an address to a function")]
        let driver =
            unsafe { std::mem::transmute::<*const c_void, Driver>(ptr::with_exposed_provenance(driver)) };
        Ok(Self { driver, function, sizes, early })
    }

    /// Queues it; the driver's error code.
    #[pyo3(signature = (stream, arguments, /))]
    fn queue(&self, py: Python<'_>, stream: usize, arguments: &Bound<'_, PyTuple>) -> PyResult<c_int> {
        let (given, mut words) = (arguments.len(), [0; MOST_ARGUMENTS]);
        if given > MOST_ARGUMENTS {
            let message =
                format!("{given} arguments of a kernel are too many; it has at most {MOST_ARGUMENTS}");
            return Err(PyValueError::new_err(message));
        }
        for (word, argument) in words.iter_mut().zip(arguments.iter_borrowed()) {
            *word = argument.extract()?;
        }
        enter(py, || Ok(self.launch(stream, &words)))
    }
}

impl Launch {
    fn launch(&self, stream: usize, words: &[i64; MOST_ARGUMENTS]) -> c_int {
        let Self { driver, function, sizes, early } = *self;
        let attributes: &[Attribute] = if early { std::slice::from_ref(&EARLY) } else { &[] };
        let config =
            Config { sizes, stream, attributes: attributes.as_ptr(), count: attributes.len() as c_uint };
        let arguments = words.each_ref().map(ptr::from_ref);
        // SAFETY: the driver reads the config and as many arguments as the kernel has; both outlive the call. That
        // there are as many words of a last parameter that is a struct, as the kernel was compiled for, and what
        // the arguments point to on the GPU, is the caller's (`ops/cuda/launcher.py`).
        unsafe { driver(&raw const config, function, arguments.as_ptr(), ptr::null()) }
    }
}
