//! pack and unpack on one thread: of 64 Mi elements, against a copy that moves as many bytes, and of 64 Ki
//! elements, which stay in L2 and show what the arithmetic alone costs.
//!
//! Criterion's throughput counts bytes read plus bytes written, for the copies too: equal numbers mean that the
//! work costs nothing beside the memory traffic. `TURBOQUANT_ISA` picks the instruction set.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use turboquant_core::*;

/// Elements in memory, and in L2.
const SIZES: [(&str, usize); 2] = [("memory", 64 << 20), ("L2", 64 << 10)];
const GROUP: usize = 64;

/// Rows of 4096 elements.
fn shape(elements: usize) -> Shape {
    Shape { rows: elements / 4096, k: 4096 }
}

/// A buffer that begins at a cache line, as those of torch do.
struct Buffer<T>(Vec<T>, usize);

impl<T: Copy> Buffer<T> {
    fn new(value: T, len: usize) -> Self {
        let vec = vec![value; len + 64];
        let skipped = vec.as_ptr().align_offset(64);
        Self(vec, skipped)
    }

    fn get(&self) -> &[T] {
        &self.0[self.1..self.0.len() - 64 + self.1]
    }

    fn get_mut(&mut self) -> &mut [T] {
        let end = self.0.len() - 64 + self.1;
        &mut self.0[self.1..end]
    }
}

/// Uniform deviates in ±1 from a counter.
fn values(elements: usize) -> Buffer<f32> {
    let block = |i: usize| philox([i as u32, 0, 0, 0], [1, 2]).map(|word| word as i32 as f32 / 2f32.powi(31));
    let mut x = Buffer::new(0.0, elements);
    for (i, x) in x.get_mut().chunks_exact_mut(4).enumerate() {
        x.copy_from_slice(&block(i));
    }
    x
}

fn scheme(bits: u32, symmetric: bool, scale: ScaleRule) -> Scheme {
    Scheme::new(bits, GROUP, symmetric, false, &[], scale, ScaleDtype::Bf16).expect("a valid scheme")
}

fn stochastic(mode: Mode) -> Rounding {
    Rounding::new(mode, 7, 0, 0, 16, 1.0, false, 0).expect("a valid rounding")
}

/// Bytes that packing or unpacking moves.
fn moved(elements: usize, planes: &Planes) -> usize {
    elements * 4 + planes.nbytes(1, elements) + elements / GROUP * 2
}

/// Reads and copies as many bytes, read and written taken together.
fn bench_copy(c: &mut Criterion) {
    let mut group = c.benchmark_group("read");
    for (place, elements) in SIZES {
        let from = Buffer::new(1u8, moved(elements, &Planes::of_bits(4)));
        group.throughput(Throughput::Bytes(from.get().len() as u64));
        group.bench_function(place, |b| b.iter(|| read_bandwidth(black_box(from.get()), 1)));
    }
    group.finish();

    let mut group = c.benchmark_group("copy");
    for (place, elements) in SIZES {
        let moved = moved(elements, &Planes::of_bits(4));
        let (from, mut to) = (Buffer::new(1u8, moved / 2), Buffer::new(2u8, moved / 2));
        group.throughput(Throughput::Bytes(moved as u64));
        group.bench_function(place, |b| {
            b.iter(|| copy_bandwidth(black_box(from.get()), black_box(to.get_mut()), 1))
        });
    }
    group.finish();
}

fn bench_pack(c: &mut Criterion) {
    let uniform = |bits| scheme(bits, true, ScaleRule::Extreme);
    let cases = [
        ("1-bit nearest", uniform(1), Rounding::nearest()),
        ("2-bit nearest", uniform(2), Rounding::nearest()),
        ("3-bit nearest", uniform(3), Rounding::nearest()),
        ("4-bit nearest", uniform(4), Rounding::nearest()),
        ("8-bit nearest", uniform(8), Rounding::nearest()),
        ("4-bit asymmetric", scheme(4, false, ScaleRule::Extreme), Rounding::nearest()),
        ("4-bit mse", scheme(4, true, ScaleRule::Mse), Rounding::nearest()),
        ("4-bit iid", uniform(4), stochastic(Mode::Iid)),
        ("4-bit antithetic", uniform(4), stochastic(Mode::Antithetic)),
        ("4-bit stratified", uniform(4), stochastic(Mode::Stratified)),
        ("4-bit systematic", uniform(4), stochastic(Mode::Systematic)),
        ("8-bit iid", uniform(8), stochastic(Mode::Iid)),
    ];
    for (place, elements) in SIZES {
        let x = values(elements);
        let mut scales = vec![0u16; elements / GROUP];
        let mut zero_points = vec![0u8; elements / GROUP];
        let mut group = c.benchmark_group(format!("pack/{place}"));
        for (name, scheme, rounding) in &cases {
            let planes = Planes::of_bits(scheme.bits());
            let mut packed = Buffer::new(0u8, planes.nbytes(1, elements));
            group.throughput(Throughput::Bytes(moved(elements, &planes) as u64));
            group.bench_function(BenchmarkId::from_parameter(name), |b| {
                b.iter(|| {
                    let zero_points = match scheme.symmetric() {
                        true => ZeroPointsMut::Constant,
                        false => ZeroPointsMut::U8(&mut zero_points),
                    };
                    let (x, shape) = (Source::F32(black_box(x.get())), shape(elements));
                    let scales = ScalesMut::Bf16(&mut scales);
                    pack(x, shape, scheme, rounding, &planes, false, packed.get_mut(), scales, zero_points, 1)
                });
            });
        }
        group.finish();
    }
}

fn bench_unpack(c: &mut Criterion) {
    for (place, elements) in SIZES {
        let mut out = Buffer::new(0f32, elements);
        let scales = vec![0x3f80u16; elements / GROUP];
        let mut group = c.benchmark_group(format!("unpack/{place}"));
        for bits in [1, 3, 4, 8] {
            let (scheme, rounding) = (scheme(bits, true, ScaleRule::Extreme), Rounding::nearest());
            let planes = Planes::of_bits(bits);
            let packed = Buffer::new(0x5au8, planes.nbytes(1, elements));
            group.throughput(Throughput::Bytes(moved(elements, &planes) as u64));
            group.bench_function(BenchmarkId::from_parameter(format!("{bits}-bit to f32")), |b| {
                b.iter(|| {
                    let (scales, zero_points) = (Scales::Bf16(&scales), ZeroPoints::Constant);
                    let (out, shape) = (Target::F32(black_box(out.get_mut())), shape(elements));
                    unpack(
                        packed.get(),
                        scales,
                        zero_points,
                        shape,
                        &scheme,
                        &rounding,
                        &planes,
                        bits,
                        out,
                        1,
                    )
                });
            });
        }
        group.finish();
    }
}

fn config() -> Criterion {
    if let Ok(name) = std::env::var("TURBOQUANT_ISA") {
        force_isa(Some(&name)).expect("an instruction set of this CPU");
    }
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
}

criterion_group!(name = benches; config = config(); targets = bench_copy, bench_pack, bench_unpack);
criterion_main!(benches);
