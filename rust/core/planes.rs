//! Codes to bit planes and back: the canonical layout.
//!
//! One blob, plane after plane, most significant first; each plane row-major, each row padded to a byte,
//! element `i` of a row at bit `i · width`, little-endian. A prefix of the planes is a prefix of the blob.

use crate::error::Error;
use crate::parallel::{self, Span};
use crate::scheme::{MAX_PLANES, Planes, row_bytes};
use crate::simd::{Isa, Kernel, TILE, dispatch};
use crate::{Shape, parallel::take, parallel::take_mut};

/// Bytes of a tile of 64 codes in a plane of that width.
const fn tile_bytes(width: u32) -> usize {
    TILE / 8 * width as usize
}

/// Copies a chunk that may be short into a whole one, zeros behind it.
#[inline(always)]
pub(crate) fn padded<T: Copy + Default, const N: usize>(from: &[T]) -> [T; N] {
    let mut whole = [T::default(); N];
    whole[..from.len()].copy_from_slice(from);
    whole
}

/// The parts of all planes that belong to one span, written front to back.
pub(crate) struct PlaneWriter<'a> {
    widths: Planes,
    rest: [&'a mut [u8]; MAX_PLANES],
}

impl<'a> PlaneWriter<'a> {
    /// Cuts a blob along `spans`.
    pub(crate) fn cut(packed: &'a mut [u8], planes: Planes, shape: Shape, spans: &[Span]) -> Vec<Self> {
        let mut blob = packed;
        let mut rest: [&mut [u8]; MAX_PLANES] = Default::default();
        for (plane, width) in rest.iter_mut().zip(planes.widths()) {
            *plane = take_mut(&mut blob, shape.rows * row_bytes(shape.k, *width));
        }
        let mut cut = |span: &Span| {
            let mut part: [&mut [u8]; MAX_PLANES] = Default::default();
            for ((part, rest), width) in part.iter_mut().zip(&mut rest).zip(planes.widths()) {
                *part = take_mut(rest, span.plane_bytes(*width));
            }
            Self { widths: planes, rest: part }
        };
        spans.iter().map(&mut cut).collect()
    }

    /// Appends the first `len` of the codes in `tiles`. Only the last call of a row may have a `len` that is
    /// not a multiple of 64; the codes behind `len` must be 0.
    #[inline(always)]
    pub(crate) fn write<I: Isa>(&mut self, isa: I, tiles: &[[u8; TILE]], len: usize) {
        let mut shift = self.widths.bits();
        for (plane, width) in self.rest.iter_mut().zip(self.widths.widths()) {
            shift -= width;
            let out = take_mut(plane, row_bytes(len, *width));
            match width {
                8 => write_plane::<I, 64>(isa, out, tiles, shift),
                4 => write_plane::<I, 32>(isa, out, tiles, shift),
                2 => write_plane::<I, 16>(isa, out, tiles, shift),
                _ => write_plane::<I, 8>(isa, out, tiles, shift),
            }
        }
    }
}

/// Packs tile by tile into `out`, `N` bytes a tile, the last one perhaps cut short.
#[inline(always)]
fn write_plane<I: Isa, const N: usize>(isa: I, out: &mut [u8], tiles: &[[u8; TILE]], shift: u32) {
    for (to, codes) in out.chunks_mut(N).zip(tiles) {
        let codes = isa.load_u8(codes);
        match to.first_chunk_mut::<N>() {
            Some(to) => pack_tile(isa, to, codes, shift),
            None => {
                let mut last = [0; N];
                pack_tile(isa, &mut last, codes, shift);
                to.copy_from_slice(&last[..to.len()]);
            }
        }
    }
}

/// Packs 64 fields of N / 8 bits, which begin at bit `shift` of the codes.
#[inline(always)]
fn pack_tile<I: Isa, const N: usize>(isa: I, to: &mut [u8; N], codes: I::U8, shift: u32) {
    let fields = if N == 64 { codes } else { isa.shr_and_u8(codes, shift, ((1 << (N / 8)) - 1) as u8) };
    if let Some(to) = to.first_chunk_mut::<64>() {
        isa.store_u8(to, fields);
    } else if let Some(to) = to.first_chunk_mut::<32>() {
        isa.pack4(to, fields);
    } else if let Some(to) = to.first_chunk_mut::<16>() {
        isa.pack2(to, fields);
    } else if let Some(to) = to.first_chunk_mut::<8>() {
        isa.pack1(to, fields);
    }
}

/// The parts of the planes read that belong to one span, read front to back.
#[derive(Clone, Copy)]
pub(crate) struct PlaneReader<'a> {
    widths: Planes,
    rest: [&'a [u8]; MAX_PLANES],
}

impl<'a> PlaneReader<'a> {
    /// Cuts the planes of `prefix` in a blob along `spans`.
    pub(crate) fn cut(packed: &'a [u8], prefix: Planes, shape: Shape, spans: &[Span]) -> Vec<Self> {
        let mut blob = packed;
        let mut rest: [&[u8]; MAX_PLANES] = Default::default();
        for (plane, width) in rest.iter_mut().zip(prefix.widths()) {
            *plane = take(&mut blob, shape.rows * row_bytes(shape.k, *width));
        }
        let mut cut = |span: &Span| {
            let mut part: [&[u8]; MAX_PLANES] = Default::default();
            for ((part, rest), width) in part.iter_mut().zip(&mut rest).zip(prefix.widths()) {
                *part = take(rest, span.plane_bytes(*width));
            }
            Self { widths: prefix, rest: part }
        };
        spans.iter().map(&mut cut).collect()
    }

    /// The next `len` codes of the row, at most 64, zeros behind them. Only the last call of a row may have
    /// a `len` below 64.
    #[inline(always)]
    pub(crate) fn read<I: Isa>(&mut self, isa: I, len: usize) -> I::U8 {
        let mut codes = isa.splat_u8(0);
        for (plane, width) in self.rest.iter_mut().zip(self.widths.widths()) {
            let part = match width {
                8 => isa.load_u8(&take_tile(plane, *width, len)),
                4 => isa.unpack4(&take_tile(plane, *width, len)),
                2 => isa.unpack2(&take_tile(plane, *width, len)),
                _ => isa.unpack1(&take_tile(plane, *width, len)),
            };
            // A plane of 8 bits is alone: nothing to make room for.
            codes = if *width == 8 { part } else { isa.shl_or_u8(codes, *width, part) };
        }
        codes
    }
}

/// The bytes of the next `len` codes of a plane.
#[inline(always)]
fn take_tile<const N: usize>(plane: &mut &[u8], width: u32, len: usize) -> [u8; N] {
    debug_assert_eq!(N, tile_bytes(width));
    match plane.split_first_chunk::<N>() {
        Some((tile, rest)) if len == TILE => {
            *plane = rest;
            *tile
        }
        _ => padded(take(plane, row_bytes(len, width))),
    }
}

struct PackCodes<'a> {
    codes: &'a [u8],
    planes: PlaneWriter<'a>,
    k: usize,
}

impl Kernel for PackCodes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        for row in self.codes.chunks_exact(self.k) {
            let (tiles, rest) = row.as_chunks::<TILE>();
            self.planes.write(isa, tiles, tiles.len() * TILE);
            if !rest.is_empty() {
                self.planes.write(isa, &[padded(rest)], rest.len());
            }
        }
    }
}

/// Stacks codes into bit planes.
///
/// `codes`: rows · k bytes; `packed`: `planes.nbytes(rows, k)` bytes. Bits of a code above the planes are
/// dropped. Errors: [`Error::Length`].
pub fn pack_codes(
    codes: &[u8],
    shape: Shape,
    planes: &Planes,
    packed: &mut [u8],
    threads: usize,
) -> Result<(), Error> {
    shape.check("codes", codes.len(), shape.len())?;
    shape.check("packed", packed.len(), planes.nbytes(shape.rows, shape.k))?;
    let spans = parallel::spans(shape, TILE, threads);
    let mut rest = codes;
    let tasks = PlaneWriter::cut(packed, *planes, shape, &spans).into_iter().zip(&spans);
    let tasks = tasks
        .map(|(planes, span)| PackCodes {
            codes: take(&mut rest, span.len()),
            planes,
            k: span.end - span.begin,
        })
        .collect();
    parallel::for_each(threads, tasks, dispatch);
    Ok(())
}

struct UnpackCodes<'a> {
    planes: PlaneReader<'a>,
    codes: &'a mut [u8],
    k: usize,
}

impl Kernel for UnpackCodes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        for row in self.codes.chunks_exact_mut(self.k) {
            let (tiles, rest) = row.as_chunks_mut::<TILE>();
            for tile in tiles {
                let codes = self.planes.read(isa, TILE);
                isa.store_u8(tile, codes);
            }
            if !rest.is_empty() {
                let mut tile = [0; TILE];
                let codes = self.planes.read(isa, rest.len());
                isa.store_u8(&mut tile, codes);
                rest.copy_from_slice(&tile[..rest.len()]);
            }
        }
    }
}

/// Reads the top `read_bits` bits of every code.
///
/// `packed`: the whole blob, or the prefix of it that holds those planes; `codes`: rows · k bytes, each below
/// `2^read_bits`. Errors: [`Error::Length`], [`Error::ReadBits`].
pub fn unpack_codes(
    packed: &[u8],
    shape: Shape,
    planes: &Planes,
    read_bits: u32,
    codes: &mut [u8],
    threads: usize,
) -> Result<(), Error> {
    let prefix = planes.prefix(read_bits)?;
    check_packed(packed, shape, planes, &prefix)?;
    shape.check("codes", codes.len(), shape.len())?;
    let spans = parallel::spans(shape, TILE, threads);
    let mut rest = codes;
    let tasks = PlaneReader::cut(packed, prefix, shape, &spans).into_iter().zip(&spans);
    let tasks = tasks
        .map(|(planes, span)| UnpackCodes {
            planes,
            codes: take_mut(&mut rest, span.len()),
            k: span.end - span.begin,
        })
        .collect();
    parallel::for_each(threads, tasks, dispatch);
    Ok(())
}

/// Refuses a blob that is neither all planes nor those of `prefix`.
pub(crate) fn check_packed(
    packed: &[u8],
    shape: Shape,
    planes: &Planes,
    prefix: &Planes,
) -> Result<(), Error> {
    if packed.len() == prefix.nbytes(shape.rows, shape.k) {
        return Ok(());
    }
    shape.check("packed", packed.len(), planes.nbytes(shape.rows, shape.k))
}
