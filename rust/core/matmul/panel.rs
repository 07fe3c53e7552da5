//! Panels: 16 rows of the weight side by side, a row a lane, so that no sum ever crosses lanes.

use crate::Shape;
use crate::parallel::Span;
use crate::planes::{PlaneReader, padded};
use crate::scheme::{MAX_PLANES, Planes, row_bytes};
use crate::simd::dot::Dot;
use crate::simd::{Isa, LANES, TILE};

/// 16 lanes in memory, by their bits.
pub(super) type Lanes = [u32; LANES];

/// Rows become lanes: lane `r` of result `c` is lane `c` of row `r`.
#[inline(always)]
pub(super) fn transpose<I: Isa>(isa: I, rows: &[I::F32; LANES]) -> [I::F32; LANES] {
    // The order of rows that the four exchanges turn into lanes 0 to 15, as in `simd::fold`.
    const ROW: [usize; LANES] = [0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15];
    let mut v = *rows;
    for i in 0..LANES {
        v[i] = rows[ROW[i]];
    }
    for i in 0..8 {
        (v[i], v[i + 8]) = isa.split::<8>(v[i], v[i + 8]);
    }
    for i in [0, 1, 2, 3, 8, 9, 10, 11] {
        (v[i], v[i + 4]) = isa.split::<4>(v[i], v[i + 4]);
    }
    for i in [0, 1, 4, 5, 8, 9, 12, 13] {
        (v[i], v[i + 2]) = isa.split::<2>(v[i], v[i + 2]);
    }
    for i in [0, 2, 4, 6, 8, 10, 12, 14] {
        (v[i], v[i + 1]) = isa.split::<1>(v[i], v[i + 1]);
    }
    v
}

/// Stores the transpose of 16 rows of 16 lanes.
#[inline(always)]
pub(super) fn store_transposed<I: Isa>(isa: I, rows: &[I::F32; LANES], to: &mut [Lanes]) {
    let columns = transpose(isa, rows);
    for (to, column) in to.iter_mut().zip(columns) {
        isa.store_i32(to, isa.to_bits(column));
    }
}

/// Transposes up to 16 rows of `k` elements of f32, given one behind the other.
#[inline(always)]
pub(super) fn transpose_rows<I: Isa>(isa: I, rows: &[f32], k: usize, to: &mut [Lanes]) {
    for (column, to) in (0..k).step_by(LANES).zip(to.chunks_mut(LANES)) {
        let mut lanes = [isa.splat(0.0); LANES];
        for (lane, row) in lanes.iter_mut().zip(rows.chunks_exact(k)) {
            *lane = match row[column..].first_chunk() {
                Some(whole) => isa.load(whole),
                None => isa.load(&padded(&row[column..])),
            };
        }
        store_transposed(isa, &lanes, to);
    }
}

/// A reader for each of the rows `first` to `first + count` of a packed matrix.
pub(super) fn row_readers<'a>(
    packed: &'a [u8],
    prefix: Planes,
    shape: Shape,
    first: usize,
    count: usize,
) -> Vec<PlaneReader<'a>> {
    let span = |row, rows| Span { row, rows, group: 0, groups: 0, begin: 0, end: shape.k };
    let spans: Vec<Span> =
        [span(0, first)].into_iter().chain((first..first + count).map(|row| span(row, 1))).collect();
    PlaneReader::cut(packed, prefix, shape, &spans).split_off(1)
}

/// The bytes of a panel in every plane, fetched a tile at a time while the panel before it is multiplied: its
/// rows are too short for the hardware to see streams in them.
pub(super) struct Ahead<'a> {
    planes: Planes,
    rest: [&'a [u8]; MAX_PLANES],
}

impl<'a> Ahead<'a> {
    /// The panel of the rows from `first` on.
    pub(super) fn new(packed: &'a [u8], planes: Planes, shape: Shape, first: usize) -> Self {
        let mut rest: [&[u8]; MAX_PLANES] = Default::default();
        let mut begin = 0;
        for (rest, width) in rest.iter_mut().zip(planes.widths()) {
            let row = row_bytes(shape.k, *width);
            let (from, to) = (first.min(shape.rows), (first + LANES).min(shape.rows));
            *rest = &packed[begin + from * row..begin + to * row];
            begin += shape.rows * row;
        }
        Self { planes, rest }
    }

    /// Asks for as many bytes as a tile of the panel takes.
    #[inline(always)]
    pub(super) fn fetch<D: Dot>(&mut self, dot: D) {
        for (rest, width) in self.rest.iter_mut().zip(self.planes.widths()) {
            let (now, later) = rest.split_at(rest.len().min(LANES * TILE / 8 * *width as usize));
            now.iter().step_by(64).for_each(|byte| dot.isa().prefetch(byte));
            *rest = later;
        }
    }
}
