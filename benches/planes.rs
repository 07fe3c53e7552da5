//! pack_codes and unpack_codes of 16 Mi codes on one thread.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use turboquant_core::{Planes, Shape, pack_codes, unpack_codes};

const SHAPE: Shape = Shape { rows: 4096, k: 4096 };

fn bench_planes(c: &mut Criterion) {
    let mut group = c.benchmark_group("planes");
    let mut codes = vec![1u8; SHAPE.len()];
    for widths in [&[8][..], &[4, 2, 1], &[4], &[2], &[1], &[4, 4], &[2, 1, 1, 1, 1, 2]] {
        let planes = Planes::new(widths).expect("valid planes");
        let mut packed = vec![0u8; planes.nbytes(SHAPE.rows, SHAPE.k)];
        group.throughput(Throughput::Bytes((codes.len() + packed.len()) as u64));
        group.bench_function(BenchmarkId::new("pack", format!("{widths:?}")), |b| {
            b.iter(|| pack_codes(black_box(&codes), SHAPE, &planes, black_box(&mut packed), 1));
        });
        group.bench_function(BenchmarkId::new("unpack", format!("{widths:?}")), |b| {
            b.iter(|| {
                unpack_codes(black_box(&packed), SHAPE, &planes, planes.bits(), black_box(&mut codes), 1)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, bench_planes);
criterion_main!(benches);
