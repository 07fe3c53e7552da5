//! Large pages for memory that is read again and again.

/// Size of a large page on x86-64 and, as a rule, on Arm.
#[cfg(target_os = "linux")]
const LARGE_PAGE: usize = 1 << 21;

/// Asks the system to back `bytes`, not yet written to, with large pages: streaming through them then does not
/// wait for address translation. Nothing but speed depends on the answer.
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "a system call")]
pub(crate) fn advise_large_pages(bytes: &mut [u8]) {
    let skip = bytes.as_ptr().align_offset(LARGE_PAGE).min(bytes.len());
    let whole = (bytes.len() - skip) / LARGE_PAGE * LARGE_PAGE;
    if whole > 0 {
        let pages = &mut bytes[skip..skip + whole];
        // SAFETY: the range is whole pages of memory borrowed here, and this advice changes no contents.
        unsafe { libc::madvise(pages.as_mut_ptr().cast(), pages.len(), libc::MADV_HUGEPAGE) };
    }
}

/// Other systems decide by themselves.
#[cfg(not(target_os = "linux"))]
pub(crate) fn advise_large_pages(_bytes: &mut [u8]) {}
