//! y = x · Wᵀ (+ bias) with W packed.
//!
//! ```text
//!  x ──► q, s_x, Σq  (activations.rs)  ─┐
//!                                       ├─► codes.rs, tile.rs ──► y
//!  W ──► panels of 64 rows (panel.rs)  ─┼─► floats.rs ──────────► y
//!                                       ├─► values.rs ──────────► y
//!  x as f32 ────────────────────────────┘
//! ```
//!
//! Codes meet x in bytes (codes.rs) or in floats (floats.rs). Weights that are no affine function of integer codes
//! are dequantized first (values.rs).
//!
//! W comes in the canonical layout, whose rows are transposed on the way, or in the compute layout, which a
//! weight that is used again and again is brought to once (repack.rs).
//!
//! Both ways give the same bits on every instruction set and for any number of threads.
//! Rows of x may read W at different numbers of bits (refined.rs).

use std::borrow::Cow;
use std::ops::Range;

use crate::Shape;
use crate::error::Error;
use crate::parallel;
use crate::planes::check_packed;
use crate::quantize::{Rows, Scales, Source, Target, ZeroPoints, check_groups, readable};
use crate::scheme::{Mode, Planes, Rounding, Scheme};
use crate::simd::dot::has_blocks;
use crate::simd::floats::{dispatch_products, prefers_bf16};
use crate::simd::multiply::{dispatch_bytes, offset};
use crate::simd::{Isa, Kernel, LANES, TILE, Token};

mod activations;
mod affine;
mod codes;
mod cuts;
mod factors;
mod floats;
mod output;
mod panel;
mod refined;
mod repack;
mod strips;
mod sums;
#[cfg(test)]
mod tests;
mod tile;
mod values;

use activations::Numbers;
use affine::Affine;
use cuts::Cuts;
use output::{Columns, Part};
use panel::PANEL;
pub use refined::matmul_refined;
pub use repack::{from_panels, panels_nbytes, to_panels};

/// How the codes, scales and zero points of a weight lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// As the number contract has them: row by row.
    Canonical,
    /// As the kernels read them: see [`to_panels`].
    Panels,
}

impl Layout {
    /// The layout of that name.
    pub fn from_name(name: &str) -> Result<Self, Error> {
        match name {
            "canonical" => Ok(Self::Canonical),
            "panels" => Ok(Self::Panels),
            _ => Err(Error::Scheme(format!("unknown layout {name:?}; use \"canonical\" or \"panels\""))),
        }
    }
}

/// How activations meet the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activations {
    /// Quantized to int8 on the fly, per row and group; integer products.
    Int8,
    /// As they are, against exact codes; sums in f32.
    Float,
}

impl Activations {
    /// The way of that name.
    pub fn from_name(name: &str) -> Result<Self, Error> {
        match name {
            "int8" => Ok(Self::Int8),
            "float" => Ok(Self::Float),
            _ => Err(Error::Scheme(format!("unknown activations {name:?}; use \"int8\" or \"float\""))),
        }
    }
}

/// Multiplications worth waking a thread for.
const MIN_WORK: usize = 1 << 18;
/// Parts a thread, so that a slow one can be helped out.
const PARTS_A_THREAD: usize = 4;
/// Rows of x whose running results stay in the caches.
const MAX_ROWS: usize = 512;

/// y = x · Wᵀ (+ bias).
///
/// * `x`: m · k elements, row-major; `out`: m · n, rounded to its type.
/// * `packed`, `scales`, `zero_points`, `scheme`, `rounding`, `planes`, `read_bits`: W of n rows and k columns,
///   `shape`, as for [`crate::unpack`], in `layout`.
/// * `bias`: n elements, added in f32.
///
/// A row of x with NaN or ±Inf gives a row of NaN. Errors: lengths and kinds of the buffers, prefixes that cannot
/// be read, weights without an integer form (`preserve="mean+var"`, subtractive dither) with
/// [`Activations::Int8`], and subtractive dither in [`Layout::Panels`].
pub fn matmul(
    x: Source<'_>,
    m: usize,
    packed: &[u8],
    scales: Scales<'_>,
    zero_points: ZeroPoints<'_>,
    bias: Option<&[f32]>,
    shape: Shape,
    scheme: &Scheme,
    rounding: &Rounding,
    planes: &Planes,
    read_bits: u32,
    layout: Layout,
    activations: Activations,
    out: Target<'_>,
    threads: usize,
) -> Result<(), Error> {
    let weight = checked(packed, scales, zero_points, shape, scheme, rounding, planes, read_bits, layout)?;
    matmul_on(Token::active(), x, m, &weight, layout, bias, activations, out, threads)
}

/// A weight to be read at `read_bits`, its memory checked.
fn checked<'a>(
    packed: &'a [u8],
    scales: Scales<'a>,
    zero_points: ZeroPoints<'a>,
    shape: Shape,
    scheme: &Scheme,
    rounding: &Rounding,
    planes: &Planes,
    read_bits: u32,
    layout: Layout,
) -> Result<Rows<'a>, Error> {
    let prefix = readable(scheme, rounding, planes, read_bits)?;
    match layout {
        Layout::Canonical => {
            check_groups(shape, scheme, rounding, scales, zero_points)?;
            check_packed(packed, shape, planes, &prefix)?;
        }
        Layout::Panels => {
            check_groups(repack::padded_shape(shape), scheme, rounding, scales, zero_points)?;
            repack::check_panels(packed, shape, scheme, planes, &prefix)?;
            check_positions(rounding)?;
        }
    }
    Ok(Rows { packed, scales, zero_points, shape, scheme: *scheme, rounding: *rounding, prefix, read_bits })
}

/// [`matmul`] on a given instruction set, the weight already checked.
fn matmul_on(
    isa: Token,
    x: Source<'_>,
    m: usize,
    weight: &Rows<'_>,
    layout: Layout,
    bias: Option<&[f32]>,
    activations: Activations,
    out: Target<'_>,
    threads: usize,
) -> Result<(), Error> {
    check_operands(x, m, weight.shape, bias, &out)?;
    if activations == Activations::Int8 {
        check_integer_form(&weight.rounding)?;
    }
    if out.len() > 0 {
        let out = Columns::of(out, weight.shape.rows);
        multiply(isa, x, m, weight, layout, bias, activations, out, threads);
    }
    Ok(())
}

/// Refuses operands that do not fit a weight of that shape.
fn check_operands(
    x: Source<'_>,
    m: usize,
    shape: Shape,
    bias: Option<&[f32]>,
    out: &Target<'_>,
) -> Result<(), Error> {
    let Shape { rows: n, k } = shape;
    Shape { rows: m, k }.check("x", x.len(), m * k)?;
    Shape { rows: m, k: n }.check("out", out.len(), m * n)?;
    match bias {
        Some(bias) => Shape { rows: 1, k: n }.check("bias", bias.len(), n),
        None => Ok(()),
    }
}

/// [`matmul_on`], everything checked, with a row of `out` for each of the `m` rows of x: at least one.
fn multiply(
    isa: Token,
    x: Source<'_>,
    m: usize,
    weight: &Rows<'_>,
    layout: Layout,
    bias: Option<&[f32]>,
    activations: Activations,
    out: Columns<'_>,
    threads: usize,
) {
    let Shape { rows: n, k } = weight.shape;
    let numbers = match activations {
        Activations::Int8 => Some(Numbers::Int8),
        Activations::Float if !has_integer_form(&weight.rounding) => None,
        Activations::Float if matches!(x, Source::Bf16(_)) && prefers_bf16(isa) => Some(Numbers::Bf16),
        Activations::Float => Some(Numbers::F32),
    };
    let longest = numbers.map_or(cuts::MAX_SEGMENT, Numbers::longest_segment);
    let cuts = Cuts::without_blocks(k, weight.scheme.group_len(k), longest);
    // The order of codes if whole blocks are multiplied, and the rows of x that come in one go.
    let blocks = numbers == Some(Numbers::Int8) && m >= strips::MIN_ROWS && cuts.by_units && has_blocks(isa);
    let bytes = layout == Layout::Panels && weight.prefix.widths() == [8] && weight.scheme.table().is_none();
    let tiles = blocks.then(|| strips::laid(&cuts, bytes));
    let cuts = &cuts.in_blocks(match numbers {
        Some(Numbers::Int8) if !blocks => codes::block_for_rows(m, bytes),
        Some(Numbers::Int8) | None => cuts::BLOCK,
        Some(numbers) => floats::block_for_rows(m, numbers.word()),
    });
    let (max_rows, strip, parts) = match blocks {
        true => (strips::max_rows(k), strips::ROWS, strips::PARTS_A_THREAD),
        false => (MAX_ROWS, 1, PARTS_A_THREAD),
    };
    let parts = cut(out, m, n, k, max_rows, strip, parts, threads);
    match numbers {
        Some(numbers) => by_codes(isa, numbers, x, m, weight, layout, cuts, bias, parts, tiles, threads),
        None => by_values(isa, x, m, weight, layout, cuts, bias, parts, threads),
    }
}

/// The work of one thread at a time: some panels of the weight, some rows of x; in bytes (codes.rs) or in floats
/// (floats.rs).
struct Work<'a> {
    weight: &'a Rows<'a>,
    layout: Layout,
    cuts: &'a Cuts,
    affine: &'a Affine,
    x: &'a activations::Activations,
    bias: Option<&'a [f32]>,
    /// Rows of x.
    rows: Range<usize>,
    /// Rows of the weight, from a multiple of 64.
    outputs: Range<usize>,
    out: Columns<'a>,
    /// Whether the result bypasses the caches.
    bypass: bool,
}

/// Brings x to `numbers`, then multiplies part by part.
fn by_codes(
    isa: Token,
    numbers: Numbers,
    x: Source<'_>,
    m: usize,
    weight: &Rows<'_>,
    layout: Layout,
    cuts: &Cuts,
    bias: Option<&[f32]>,
    parts: Vec<Part<'_>>,
    tiles: Option<panel::Laid>,
    threads: usize,
) {
    let max_code = affine::max_code(weight.scheme.table(), weight.prefix.bits());
    let (floats, offset) = match numbers {
        Numbers::Int8 => (false, offset(isa, max_code)),
        Numbers::Bf16 | Numbers::F32 => (true, 0),
    };
    let affine = &Affine::new(&weight.scheme, weight.read_bits, cuts, floats, offset);
    let x = &activations::Activations::new(isa, numbers, x, m, weight.shape.k, cuts, affine, tiles, threads);
    parallel::for_each(threads, parts, |Part { rows, columns, out, bypass }| {
        let outputs = columns;
        let work = Work { weight, layout, cuts, affine, x, bias, rows, outputs, out, bypass };
        match numbers {
            Numbers::Int8 => dispatch_bytes(isa, max_code, work),
            Numbers::Bf16 | Numbers::F32 => {
                dispatch_products(isa, numbers == Numbers::Bf16, max_code, work);
            }
        }
    });
}

/// Multiplies part by part with dequantized weights.
fn by_values(
    isa: Token,
    x: Source<'_>,
    m: usize,
    weight: &Rows<'_>,
    layout: Layout,
    cuts: &Cuts,
    bias: Option<&[f32]>,
    parts: Vec<Part<'_>>,
    threads: usize,
) {
    let x: &[f32] = &widen(isa, x, threads);
    let k = weight.shape.k;
    let finite: &Vec<bool> =
        &(0..m).map(|row| x[row * k..][..k].iter().all(|value| value.is_finite())).collect();
    parallel::for_each(threads, parts, |Part { rows, columns, out, bypass }| {
        isa.run(values::Panels {
            weight,
            layout,
            cuts,
            x,
            finite,
            bias,
            rows,
            outputs: columns,
            out,
            bypass,
        });
    });
}

/// Refuses codes whose meaning goes by their position.
fn check_positions(rounding: &Rounding) -> Result<(), Error> {
    if rounding.mode() == Mode::Subtractive {
        return Err(Error::Rounding(
            "subtractive dither goes by the position of a code; keep the weight in the canonical layout"
                .to_owned(),
        ));
    }
    Ok(())
}

/// Whether weights are an affine function of integer codes: their zero points are, and nothing is added.
fn has_integer_form(rounding: &Rounding) -> bool {
    !rounding.preserve_variance() && rounding.mode() != Mode::Subtractive
}

/// Refuses weights of another form.
fn check_integer_form(rounding: &Rounding) -> Result<(), Error> {
    if !has_integer_form(rounding) {
        return Err(Error::Rounding(
            "weights packed with preserve=\"mean+var\" or subtractive dither have no integer form; \
             use activations=\"float\""
                .to_owned(),
        ));
    }
    Ok(())
}

/// Cuts the result in some `parts` a thread: columns first, so that each weight is unpacked once; rows where columns
/// are too few.
fn cut(
    out: Columns<'_>,
    m: usize,
    n: usize,
    k: usize,
    max_rows: usize,
    strip: usize,
    parts: usize,
    threads: usize,
) -> Vec<Part<'_>> {
    let threads = threads.clamp(1, (m * n * k.max(1)).div_ceil(MIN_WORK));
    let wanted = if threads == 1 { 1 } else { threads * parts };
    let panels = n.div_ceil(PANEL);
    let column_parts = wanted.min(panels);
    let column_step = panels.div_ceil(column_parts) * PANEL;
    let row_parts = (wanted / n.div_ceil(column_step)).max(1);
    let row_step = m.div_ceil(row_parts).next_multiple_of(strip).min(max_rows);
    output::cut(out, n, row_step, column_step)
}

/// Elements a task of [`widen`].
const WIDEN: usize = 1 << 16;

/// x as f32; f64 rounds to nearest even.
fn widen<'a>(isa: Token, x: Source<'a>, threads: usize) -> Cow<'a, [f32]> {
    if let Source::F32(x) = x {
        return Cow::Borrowed(x);
    }
    let mut widened = vec![0.0; x.len()];
    let tasks = widened.chunks_mut(WIDEN).enumerate().map(|(i, to)| Widen { x, begin: i * WIDEN, to });
    parallel::for_each(threads, tasks.collect(), |task| isa.run(task));
    Cow::Owned(widened)
}

struct Widen<'a> {
    x: Source<'a>,
    begin: usize,
    to: &'a mut [f32],
}

impl Kernel for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (i, to) in self.to.chunks_mut(TILE).enumerate() {
            let mut tile = [0.0; TILE];
            let (vectors, _) = tile.as_chunks_mut::<LANES>();
            for (vector, v) in vectors.iter_mut().zip(self.x.tile(isa, self.begin + i * TILE)) {
                isa.store::<false>(vector, v);
            }
            to.copy_from_slice(&tile[..to.len()]);
        }
    }
}
