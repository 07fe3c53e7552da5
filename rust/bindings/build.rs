//! Lays the CUDA sources where maturin takes them from into the package (`include` in `pyproject.toml`).

use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../cuda");
    println!("cargo:rerun-if-changed={}", sources.display());
    let target = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for entry in fs::read_dir(sources)? {
        let path = entry?.path();
        if matches!(path.extension().and_then(|kind| kind.to_str()), Some("cu" | "cuh")) {
            fs::copy(&path, target.join(path.file_name().expect("a file has a name")))?;
        }
    }
    Ok(())
}
