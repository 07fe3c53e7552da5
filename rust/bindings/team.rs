//! The threads of PyTorch's own operators, where those are OpenMP's of GCC.
//!
//! Its idle threads spin for a while. A second pool on the same cores would have to wait for them, and they for
//! it; as one team, whoever calls next finds the threads awake.

#![cfg_attr(unix, expect(unsafe_code, reason = "a function of a C library, found at run time"))]

use pyo3::prelude::*;

/// Runs the kernels on the threads of the OpenMP library that the shared library at `path`, already loaded,
/// is linked with. False where it has none that is known here: then the extension keeps threads of its own.
#[pyfunction]
pub(crate) fn share_threads(path: &str) -> bool {
    let found = openmp::find(path);
    if found {
        turboquant_core::lend_team(openmp::team);
    }
    found
}

#[cfg(unix)]
mod openmp {
    use std::any::Any;
    use std::ffi::{CString, c_uint, c_void};
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    use std::sync::{Mutex, OnceLock, PoisonError};

    /// `GOMP_parallel` of libgomp's ABI: calls `body` with `data` on `threads` threads of a team whose first is
    /// the caller's; returns when all have.
    type Parallel = unsafe extern "C" fn(
        body: extern "C" fn(*mut c_void),
        data: *mut c_void,
        threads: c_uint,
        flags: c_uint,
    );

    static PARALLEL: OnceLock<Parallel> = OnceLock::new();

    /// Looks for the function; true if it was found, now or before.
    pub(super) fn find(path: &str) -> bool {
        if PARALLEL.get().is_none()
            && let Ok(path) = CString::new(path)
        {
            // SAFETY: the path is a C string; nothing new is loaded, so no code runs. The library is never closed,
            // so that what is found in it stays.
            let symbol = unsafe {
                let library = libc::dlopen(path.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD);
                if library.is_null() { library } else { libc::dlsym(library, c"GOMP_parallel".as_ptr()) }
            };
            if !symbol.is_null() {
                // SAFETY: the symbol of that name is a function of this type in every library that has it.
                #[expect(clippy::disallowed_methods, reason = "the only way from an address to a function")]
                PARALLEL.get_or_init(|| unsafe { std::mem::transmute::<*mut c_void, Parallel>(symbol) });
            }
        }
        PARALLEL.get().is_some()
    }

    /// A closure on its way through C, and what it panicked with.
    struct Call<'a> {
        work: &'a (dyn Fn() + Sync),
        panic: Mutex<Option<Box<dyn Any + Send>>>,
    }

    extern "C" fn body(call: *mut c_void) {
        // SAFETY: `team` hands over a `Call` that outlives the team's work; it is only read.
        let call = unsafe { &*call.cast::<Call<'_>>() };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(call.work)) {
            *call.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
    }

    /// A [`turboquant_core::Team`].
    pub(super) fn team(threads: usize, work: &(dyn Fn() + Sync)) {
        let Some(parallel) = PARALLEL.get() else { return work() };
        let mut call = Call { work, panic: Mutex::new(None) };
        let threads = c_uint::try_from(threads).unwrap_or(c_uint::MAX);
        // SAFETY: the function has this type, `body` lets no panic out, and `call` lives until all have returned.
        unsafe { parallel(body, (&raw mut call).cast(), threads, 0) };
        if let Some(panic) = call.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }
}

/// Other systems: none that is known.
#[cfg(not(unix))]
mod openmp {
    pub(super) fn find(_path: &str) -> bool {
        false
    }

    pub(super) fn team(_threads: usize, work: &(dyn Fn() + Sync)) {
        work();
    }
}
