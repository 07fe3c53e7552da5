//! matmul on int8 activations with N = K = 4096, its weights in the compute layout.
//!
//! Weights rotate through 256 MiB of them, so that every call streams its own from memory, as a model does;
//! `read` streams as many bytes and does nothing else. Criterion's elements are operations, two a
//! multiplication. `TURBOQUANT_THREADS` sets the number of threads, one if it is not set, and `TURBOQUANT_ISA`
//! the instruction set.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use turboquant_core::*;

const SHAPE: Shape = Shape { rows: 4096, k: 4096 };
const POOL: usize = 256 << 20;

fn threads() -> usize {
    std::env::var("TURBOQUANT_THREADS").map_or(1, |threads| threads.parse().expect("a number of threads"))
}

/// Bytes that mean nothing.
fn noise(len: usize) -> Vec<u8> {
    let block = |i: usize| philox([i as u32, 0, 0, 0], [1, 2]).map(u32::to_le_bytes);
    let mut bytes = vec![0; len];
    for (i, to) in bytes.chunks_exact_mut(16).enumerate() {
        to.copy_from_slice(block(i).as_flattened());
    }
    bytes
}

fn bench_read(c: &mut Criterion, pool: &[u8]) {
    let mut group = c.benchmark_group("read");
    group.throughput(Throughput::Bytes(pool.len() as u64));
    group.bench_function("memory", |b| b.iter(|| read_bandwidth(black_box(pool), threads())));
    group.finish();
}

fn bench_matmul(c: &mut Criterion) {
    let pool = &noise(POOL);
    bench_read(c, pool);
    for (bits, group) in [(8, 0), (8, 128), (4, 128), (4, 32)] {
        let scheme = Scheme::new(bits, group, true, false, &[], ScaleRule::Extreme, ScaleDtype::Bf16)
            .expect("a valid scheme");
        let (rounding, planes) = (Rounding::nearest(), Planes::of_bits(bits));
        let scales = vec![0x3c00u16; SHAPE.rows * scheme.groups(SHAPE.k)];
        let nbytes = panels_nbytes(SHAPE, &scheme, &planes);
        let mut weights = pool.chunks_exact(nbytes).cycle();
        let mut cases = c.benchmark_group(format!("W{bits} g{group}"));
        for m in [1usize, 4, 16, 128, 512] {
            let x: Vec<f32> = noise(4 * m * SHAPE.k)
                .as_chunks::<4>()
                .0
                .iter()
                .map(|bytes| i32::from_le_bytes(*bytes) as f32)
                .collect();
            let mut out = vec![0f32; m * SHAPE.rows];
            cases.throughput(Throughput::Elements(2 * (m * SHAPE.len()) as u64));
            cases.bench_function(BenchmarkId::from_parameter(format!("m = {m}")), |b| {
                b.iter(|| {
                    matmul(
                        Source::F32(black_box(&x)),
                        m,
                        weights.next().expect("a cycle"),
                        Scales::Bf16(&scales),
                        ZeroPoints::Constant,
                        None,
                        SHAPE,
                        &scheme,
                        &rounding,
                        &planes,
                        bits,
                        Layout::Panels,
                        Activations::Int8,
                        Target::F32(black_box(&mut out)),
                        threads(),
                    )
                });
            });
        }
        cases.finish();
    }
}

fn config() -> Criterion {
    if let Ok(name) = std::env::var("TURBOQUANT_ISA") {
        force_isa(Some(&name)).expect("an instruction set of this CPU");
    }
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
}

criterion_group!(name = benches; config = config(); targets = bench_matmul);
criterion_main!(benches);
