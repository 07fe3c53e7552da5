//! The compute layout: the planes of a matrix in the order in which the kernels read them.
//!
//! ```text
//! packed       plane ▸ panel of 64 rows ▸ unit of 8 words ▸ vector of 16 rows ▸ 64 bytes
//! scales       panel ▸ group ▸ vector ▸ row                                      (and zero points)
//! ```
//!
//! A word is the codes of four columns for 16 rows. In a plane of `width` bits, `8 / width` words are stacked
//! in each 64 bytes, the first lowest: a shift and a mask bring any of them back. Rows are padded to 16, columns
//! to 32, segments that are no multiple of four to whole words. As in the canonical
//! layout, planes follow one another, so a prefix of the bits is a prefix of the bytes. Nothing is lost: the
//! canonical planes can be had again.

use crate::Shape;
use crate::error::Error;
use crate::parallel::{self, Span, take_mut};
use crate::planes::{PlaneWriter, check_packed};
use crate::quantize::{Scales, ScalesMut, ZeroPoints, ZeroPointsMut};
use crate::scheme::{MAX_PLANES, Planes, Scheme};
use crate::simd::{Isa, Kernel, LANES, TILE, VECTORS, dispatch};

use super::Layout;
use super::cuts::{Cuts, MAX_SEGMENT, UNIT};
use super::panel::{Ahead, AlignedWords, Codes, Laid, PANEL, Panel, Word, transpose};

/// Bytes of the compute layout of `planes`.
pub fn panels_nbytes(shape: Shape, scheme: &Scheme, planes: &Planes) -> usize {
    let cuts = Cuts::new(shape.k, scheme.group_len(shape.k), MAX_SEGMENT);
    shape.rows.div_ceil(LANES) * vector_bytes(&cuts, planes.bits())
}

/// Bytes of 16 rows in planes of that many bits together.
fn vector_bytes(cuts: &Cuts, bits: u32) -> usize {
    cuts.units * bits as usize * TILE
}

/// The shape of the scales and zero points of a matrix in the compute layout.
pub(super) fn padded_shape(shape: Shape) -> Shape {
    Shape { rows: shape.rows.next_multiple_of(LANES), k: shape.k }
}

/// Refuses a blob that is neither all planes nor those of `prefix`.
pub(super) fn check_panels(
    packed: &[u8],
    shape: Shape,
    scheme: &Scheme,
    planes: &Planes,
    prefix: &Planes,
) -> Result<(), Error> {
    if packed.len() == panels_nbytes(shape, scheme, prefix) {
        return Ok(());
    }
    shape.check("packed", packed.len(), panels_nbytes(shape, scheme, planes))
}

/// Rearranges packed rows into the compute layout.
///
/// * `packed`, `scales`, `zero_points`: canonical, of all `planes`.
/// * `panels`: [`panels_nbytes`] bytes; `panel_scales`, `panel_zero_points`: `groups` elements a row, for as
///   many rows as the next multiple of 16.
///
/// Errors: [`Error::Length`].
pub fn to_panels(
    packed: &[u8],
    scales: Scales<'_>,
    zero_points: ZeroPoints<'_>,
    shape: Shape,
    scheme: &Scheme,
    planes: &Planes,
    panels: &mut [u8],
    mut panel_scales: ScalesMut<'_>,
    mut panel_zero_points: ZeroPointsMut<'_>,
    threads: usize,
) -> Result<(), Error> {
    check_packed(packed, shape, planes, planes)?;
    check_panels(panels, shape, scheme, planes, planes)?;
    let order = Order { rows: shape.rows, groups: scheme.groups(shape.k), to: Layout::Panels };
    order.copy_scales(shape, scales, &mut panel_scales)?;
    order.copy_zero_points(zero_points, &mut panel_zero_points)?;
    let cuts = &Cuts::new(shape.k, scheme.group_len(shape.k), MAX_SEGMENT);
    let parts = cut_planes(panels, planes, shape, cuts);
    let tasks = parts.map(|(panel, parts)| ToPanel { packed, planes, shape, cuts, panel, parts });
    parallel::for_each(threads, tasks.collect(), dispatch);
    Ok(())
}

/// The inverse of [`to_panels`].
pub fn from_panels(
    panels: &[u8],
    panel_scales: Scales<'_>,
    panel_zero_points: ZeroPoints<'_>,
    shape: Shape,
    scheme: &Scheme,
    planes: &Planes,
    packed: &mut [u8],
    mut scales: ScalesMut<'_>,
    mut zero_points: ZeroPointsMut<'_>,
    threads: usize,
) -> Result<(), Error> {
    check_packed(packed, shape, planes, planes)?;
    check_panels(panels, shape, scheme, planes, planes)?;
    let groups = scheme.groups(shape.k);
    let order = Order { rows: shape.rows, groups, to: Layout::Canonical };
    order.copy_scales(shape, panel_scales, &mut scales)?;
    order.copy_zero_points(panel_zero_points, &mut zero_points)?;
    let cuts = &Cuts::new(shape.k, scheme.group_len(shape.k), MAX_SEGMENT);
    let all: Vec<Panel> = Panel::all(0..shape.rows).collect();
    let span =
        |panel: &Panel| Span { row: panel.first, rows: panel.rows, group: 0, groups, begin: 0, end: shape.k };
    let spans: Vec<Span> = all.iter().map(span).collect();
    let writers = PlaneWriter::cut(packed, *planes, shape, &spans);
    let tasks =
        all.into_iter().zip(writers).map(|(panel, to)| FromPanel { panels, planes, shape, cuts, panel, to });
    parallel::for_each(threads, tasks.collect(), dispatch);
    Ok(())
}

/// The way of values, one a group and row, from the other layout to `to`.
struct Order {
    rows: usize,
    groups: usize,
    to: Layout,
}

impl Order {
    /// Values in a layout: in panels, rows are padded.
    fn len(&self, layout: Layout) -> usize {
        match layout {
            Layout::Canonical => self.rows * self.groups,
            Layout::Panels => self.rows.next_multiple_of(LANES) * self.groups,
        }
    }

    /// Values in the layout that is not `to`.
    fn source_len(&self) -> usize {
        match self.to {
            Layout::Canonical => self.len(Layout::Panels),
            Layout::Panels => self.len(Layout::Canonical),
        }
    }

    fn copy_scales(&self, shape: Shape, from: Scales<'_>, to: &mut ScalesMut<'_>) -> Result<(), Error> {
        let (given, written) = match self.to {
            Layout::Canonical => ("panel_scales", "scales"),
            Layout::Panels => ("scales", "panel_scales"),
        };
        shape.check(given, from.len(), self.source_len())?;
        shape.check(written, to.view().len(), self.len(self.to))?;
        match (from, to) {
            (Scales::Bf16(from), ScalesMut::Bf16(to)) | (Scales::F16(from), ScalesMut::F16(to)) => {
                self.copy(from, to);
            }
            (Scales::F32(from), ScalesMut::F32(to)) => self.copy(from, to),
            _ => return Err(Error::Scheme("scales have one type in either layout".to_owned())),
        }
        Ok(())
    }

    fn copy_zero_points(&self, from: ZeroPoints<'_>, to: &mut ZeroPointsMut<'_>) -> Result<(), Error> {
        let fits = |from: usize, to: usize| (from, to) == (self.source_len(), self.len(self.to));
        match (from, to) {
            (ZeroPoints::Constant, ZeroPointsMut::Constant) => {}
            (ZeroPoints::U8(from), ZeroPointsMut::U8(to)) if fits(from.len(), to.len()) => {
                self.copy(from, to)
            }
            (ZeroPoints::F32(from), ZeroPointsMut::F32(to)) if fits(from.len(), to.len()) => {
                self.copy(from, to)
            }
            _ => {
                return Err(Error::Scheme(
                    "zero points have one type and number in either layout".to_owned(),
                ));
            }
        }
        Ok(())
    }

    /// Copies every value; what pads panels is zero.
    fn copy<T: Copy + Default>(&self, from: &[T], to: &mut [T]) {
        to.fill(T::default());
        for panel in Panel::all(0..self.rows) {
            let vectors = panel.vectors();
            for row in 0..panel.rows {
                for group in 0..self.groups {
                    let canonical = (panel.first + row) * self.groups + group;
                    let in_panel = (group * vectors + row / LANES) * LANES + row % LANES;
                    let in_panels = panel.first * self.groups + in_panel;
                    match self.to {
                        Layout::Canonical => to[canonical] = from[in_panels],
                        Layout::Panels => to[in_panels] = from[canonical],
                    }
                }
            }
        }
    }
}

/// The part of every plane that belongs to each panel.
fn cut_planes<'a>(
    panels: &'a mut [u8],
    planes: &Planes,
    shape: Shape,
    cuts: &Cuts,
) -> impl Iterator<Item = (Panel, [&'a mut [u8]; MAX_PLANES])> {
    let mut blob = panels;
    let mut rest: [&mut [u8]; MAX_PLANES] = Default::default();
    let widths: Vec<u32> = planes.widths().to_vec();
    let (vectors, vector) = (shape.rows.div_ceil(LANES), vector_bytes(cuts, 1));
    for (plane, width) in rest.iter_mut().zip(&widths) {
        *plane = take_mut(&mut blob, vectors * vector * *width as usize);
    }
    Panel::all(0..shape.rows).map(move |panel| {
        let mut parts: [&mut [u8]; MAX_PLANES] = Default::default();
        for ((part, rest), width) in parts.iter_mut().zip(&mut rest).zip(&widths) {
            *part = take_mut(rest, panel.vectors() * vector * *width as usize);
        }
        (panel, parts)
    })
}

/// One panel to arrange.
struct ToPanel<'a> {
    packed: &'a [u8],
    planes: &'a Planes,
    shape: Shape,
    cuts: &'a Cuts,
    panel: Panel,
    parts: [&'a mut [u8]; MAX_PLANES],
}

impl Kernel for ToPanel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { packed, planes, shape, cuts, panel, mut parts } = self;
        let mut scratch = AlignedWords::new(cuts.block_units() * VECTORS * UNIT);
        let mut codes = Codes::open(isa, packed, planes, shape, None, Layout::Canonical, cuts, panel);
        for block in &cuts.blocks {
            let words = &mut scratch.lines_mut()[..block.units.len() * panel.vectors() * UNIT];
            codes.expand(isa, cuts, shape.k, block, words, Laid::Units, &mut Ahead::default());
            let mut shift = planes.bits();
            for (part, width) in parts.iter_mut().zip(planes.widths()) {
                shift -= width;
                let part = take_mut(part, words.len() * *width as usize * TILE / 8);
                match width {
                    8 => stack::<I, 1>(isa, words, part, shift),
                    4 => stack::<I, 2>(isa, words, part, shift),
                    2 => stack::<I, 4>(isa, words, part, shift),
                    _ => stack::<I, 8>(isa, words, part, shift),
                }
            }
        }
    }
}

/// Stacks fields of 8 / N bits, from bit `shift` of the codes, of `N` words at a time.
#[inline(always)]
fn stack<I: Isa, const N: usize>(isa: I, words: &[Word], to: &mut [u8], shift: u32) {
    let width = 8 / N as u32;
    let mask = (u32::MAX >> (32 - width)) as u8;
    for (to, words) in to.as_chunks_mut().0.iter_mut().zip(words.as_chunks::<N>().0) {
        let mut stacked = isa.splat_u8(0);
        for (i, word) in words.iter().enumerate() {
            let mut field = isa.load_u8(word);
            if N > 1 {
                field = isa.shr_and_u8(field, shift, mask);
            }
            stacked = isa.shl_or_u8(field, i as u32 * width, stacked);
        }
        isa.store_u8(to, stacked);
    }
}

/// One panel to bring back.
struct FromPanel<'a> {
    panels: &'a [u8],
    planes: &'a Planes,
    shape: Shape,
    cuts: &'a Cuts,
    panel: Panel,
    to: PlaneWriter<'a>,
}

impl Kernel for FromPanel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { panels, planes, shape, cuts, panel, mut to } = self;
        let vectors = panel.vectors();
        let mut codes = Codes::open(isa, panels, planes, shape, None, Layout::Panels, cuts, panel);
        let mut scratch = AlignedWords::new(cuts.block_units() * VECTORS * UNIT);
        // Rows of the panel, each of whole units.
        let stride = cuts.words() * 4;
        let mut rows = vec![0; PANEL * stride];
        for block in &cuts.blocks {
            let words = &mut scratch.lines_mut()[..block.units.len() * vectors * UNIT];
            codes.expand(isa, cuts, shape.k, block, words, Laid::Units, &mut Ahead::default());
            for (i, units) in words.chunks(2 * vectors * UNIT).enumerate() {
                let first = (block.units.start + 2 * i) * 4 * UNIT;
                for c in 0..vectors {
                    let mut lanes = [isa.splat(0.0); LANES];
                    let units = units.chunks_exact(vectors * UNIT).map(|unit| &unit[c * UNIT..][..UNIT]);
                    for (lane, word) in lanes.iter_mut().zip(units.flatten()) {
                        *lane = isa.from_bits(isa.words(isa.load_u8(word)));
                    }
                    for (r, row) in transpose(isa, &lanes).into_iter().enumerate() {
                        let mut bytes = [0; TILE];
                        isa.store_u8(&mut bytes, isa.bytes(isa.to_bits(row)));
                        let to = &mut rows[(c * LANES + r) * stride..][..stride][first..];
                        let len = to.len().min(TILE);
                        to[..len].copy_from_slice(&bytes[..len]);
                    }
                }
            }
        }
        let mut row = vec![0; shape.k.next_multiple_of(TILE)];
        for words in rows.chunks_exact(stride.max(1)).take(panel.rows) {
            for segment in &cuts.segments {
                let from = &words[4 * segment.word..][..segment.len];
                row[segment.begin..][..segment.len].copy_from_slice(from);
            }
            to.write(isa, row.as_chunks().0, shape.k);
        }
    }
}
