//! The value that a quantized tensor decodes to, and the gradients that pass through it.
//!
//! ```text
//! forward:    x ──encode──► codes ──► s · (Q − z)                          (what unpack(pack(x)) gives)
//! backward:   x ──encode──► codes ──┬► grad of x: grad where the code was not clamped, else 0
//!                                   └► grad of s: Σ grad · (Q − z − v), v = x / s, or Q − z where clamped
//! ```
//!
//! Codes come from the one encoder of [`pack`](crate::pack), so those seen in training are those of the packed
//! tensor. The gradients are those of LSQ (Esser et al. 2020, equations 3 and 5; that of the scale times
//! 1 / √(N · Qp), section 2.2), with one difference: an element counts as clamped where its code is, half a step
//! later than by its quotient.

use crate::Shape;
use crate::error::Error;
use crate::parallel::take_mut;
use crate::quantize::{
    BATCH, Groups, Job, Numbers, Part, Scales, Sink, Source, Target, ZeroPoints, encode_spans, first_lanes,
    flush, inverses, load_tile, within_limit,
};
use crate::scheme::{Mode, Rounding, Scheme, TABLE_ZERO};
use crate::simd::{Aligned, Isa, LANES, TILE, Token, four, total};

/// Codes of a part on their way.
type Codes = Aligned<[u8; BATCH + TILE]>;

/// How a code decodes, but for its scale.
#[derive(Clone, Copy)]
struct Level {
    table: Option<[u8; 16]>,
    /// The bits read of a code.
    mask: i32,
    /// The middle of the codes that share those bits.
    centre: f32,
}

impl Level {
    fn new(scheme: &Scheme, read_bits: u32) -> Self {
        let rest = (1i32 << (scheme.bits() - read_bits)) - 1;
        Self { table: scheme.table().map(|table| *table.padded()), mask: !rest, centre: rest as f32 / 2.0 }
    }

    /// Q − z of 64 codes that begin at `at`.
    #[inline(always)]
    fn of<I: Isa>(&self, isa: I, codes: &Codes, at: usize, z: I::F32) -> [I::F32; 4] {
        let mut tile = isa.load_u8(codes.0[at..].first_chunk().unwrap_or(&[0; TILE]));
        if let Some(table) = &self.table {
            tile = isa.lookup_u8(tile, table);
        }
        let k = isa.widen(tile);
        let (mask, centre) = (isa.splat_i32(self.mask), isa.splat(self.centre));
        four!(j => isa.sub(isa.add(isa.to_f32(isa.and(k[j], mask)), centre), z))
    }
}

/// The sink of [`fake_quantize`].
struct Decoding<'a> {
    codes: Codes,
    level: Level,
    out: Target<'a>,
}

impl Sink for Decoding<'_> {
    #[inline(always)]
    fn room(&mut self) -> &mut [u8; BATCH + TILE] {
        &mut self.codes.0
    }

    #[inline(always)]
    fn take<I: Isa>(&mut self, isa: I, part: &Part<'_>) {
        for (i, x) in part.x.chunks(part.group_len).enumerate() {
            let (s, z) = (isa.splat(part.s[i]), isa.splat(part.z[i]));
            for at in (0..x.len()).step_by(TILE) {
                let v = self.level.of(isa, &self.codes, i * part.group_len + at, z);
                self.out.push(isa, false, (x.len() - at).min(TILE), four!(j => isa.mul(s, v[j])));
            }
        }
    }
}

/// Where a code is not clamped.
#[derive(Clone, Copy)]
enum Inside {
    /// The rounded quotient lies between −z and this − z.
    Codes(f32),
    /// The quotient itself lies between these: levels of a table, the signs of one bit.
    Levels(f32, f32),
}

impl Inside {
    fn new(scheme: &Scheme) -> Self {
        let end = |level: Option<&u8>| f32::from(level.copied().unwrap_or(0)) - TABLE_ZERO;
        match scheme.table() {
            Some(table) => Self::Levels(end(table.levels().first()), end(table.levels().last())),
            None if scheme.bits() == 1 => Self::Levels(-1.0, 1.0),
            None => Self::Codes(f32::from(scheme.last_code())),
        }
    }
}

/// Qp: the level farthest above the zero point; of asymmetric schemes, whose zero points differ, the last code.
fn highest_level(scheme: &Scheme) -> f32 {
    let last = f32::from(scheme.last_code());
    match (scheme.table(), scheme.zero_point()) {
        (Some(table), _) => f32::from(table.levels().last().copied().unwrap_or(0)) - TABLE_ZERO,
        (None, Some(z)) => last - z,
        (None, None) => last,
    }
}

/// The sink of [`fake_quantize_backward`].
struct Gradients<'a> {
    codes: Codes,
    level: Level,
    inside: Inside,
    qp: f32,
    grad: Source<'a>,
    grad_x: Target<'a>,
    grad_scales: &'a mut [f32],
    /// Elements and groups done.
    done: usize,
    group: usize,
    /// The sum of the group so far.
    sum: Groups,
}

impl Sink for Gradients<'_> {
    #[inline(always)]
    fn room(&mut self) -> &mut [u8; BATCH + TILE] {
        &mut self.codes.0
    }

    #[inline(always)]
    fn take<I: Isa>(&mut self, isa: I, part: &Part<'_>) {
        let inverse = inverses(part.s);
        for (i, x) in part.x.chunks(part.group_len).enumerate() {
            let (inverse, z) = (isa.splat(inverse[i]), isa.splat(part.z[i]));
            let (low, high) = match self.inside {
                Inside::Codes(last) => (-part.z[i], last - part.z[i]),
                Inside::Levels(low, high) => (low, high),
            };
            let (low, high, none) = (isa.splat(low), isa.splat(high), isa.splat(0.0));
            let mut sum = if part.begin == 0 { none } else { isa.load(&self.sum) };
            for at in (0..x.len()).step_by(TILE) {
                let count = (x.len() - at).min(TILE);
                let grad = self.grad.tile(isa, self.done);
                let x = load_tile(isa, &x[at..]);
                let q = self.level.of(isa, &self.codes, i * part.group_len + at, z);
                let mut grad_x = grad;
                for j in 0..4 {
                    let v = within_limit(isa, isa.mul(flush(isa, x[j]), inverse));
                    let reach = match self.inside {
                        Inside::Codes(_) => isa.to_f32(isa.round(v)),
                        Inside::Levels(..) => v,
                    };
                    let (above, below) = (isa.gt(reach, high), isa.gt(low, reach));
                    let inside = |a, b| isa.select(above, b, isa.select(below, b, a));
                    let slope = isa.sub(q[j], inside(v, none));
                    let term = isa.mul(grad[j], slope);
                    sum = isa.add(sum, first_lanes(isa, term, count.saturating_sub(j * LANES)));
                    grad_x[j] = inside(grad[j], none);
                }
                self.grad_x.push(isa, false, count, grad_x);
                self.done += count;
            }
            isa.store::<false>(&mut self.sum, sum);
            if part.group_ends {
                self.end_group((part.begin + x.len()) as f32);
            }
        }
    }
}

impl Gradients<'_> {
    /// Folds the sum of a group of `n` elements.
    #[inline(always)]
    fn end_group(&mut self, n: f32) {
        self.grad_scales[self.group] = total(self.sum) * (1.0 / (n * self.qp).sqrt());
        self.group += 1;
    }
}

/// Refuses what has no value of its own to decode to, and bits that cannot be read.
fn check(scheme: &Scheme, rounding: &Rounding, read_bits: u32) -> Result<(), Error> {
    if rounding.preserve_variance() || rounding.mode() == Mode::Subtractive {
        return Err(Error::Rounding(
            "fake_quantize decodes codes and scales alone; use preserve=\"mean\" and no subtractive dither"
                .to_owned(),
        ));
    }
    let bits = scheme.bits();
    let readable = if scheme.table().is_some() { bits..=bits } else { 1..=bits };
    if !readable.contains(&read_bits) {
        let (first, last) = (readable.start(), readable.end());
        return Err(Error::Scheme(format!("cannot read {read_bits} of {bits} bits; use {first} to {last}")));
    }
    Ok(())
}

/// Quantizes and dequantizes, in one pass over memory.
///
/// * `x`, `out`: rows · k elements.
/// * `numbers`: where scales and zero points go, or with which to encode. Given ones go with nearest rounding only:
///   stochastic rounding must not clip.
/// * `read_bits`: the top bits of the codes to decode, all of them or a prefix.
///
/// The result is that of [`pack`](crate::pack) and [`unpack`](crate::unpack) and does not depend on `threads`.
/// Errors: as theirs; variance-preserving rounding and subtractive dither, whose values are more than code and scale.
pub fn fake_quantize(
    x: Source<'_>,
    shape: Shape,
    scheme: &Scheme,
    rounding: &Rounding,
    numbers: Numbers<'_>,
    read_bits: u32,
    out: Target<'_>,
    threads: usize,
) -> Result<(), Error> {
    check(scheme, rounding, read_bits)?;
    if rounding.is_stochastic() && matches!(numbers, Numbers::Given(..)) {
        return Err(Error::Rounding(
            "given scales may clip, which stochastic rounding must not; round to nearest".to_owned(),
        ));
    }
    numbers.check(shape, scheme, rounding)?;
    shape.check("out", out.len(), shape.len())?;
    let (mut out, level) = (out, Level::new(scheme, read_bits));
    encode_spans(Token::active(), x, shape, scheme, rounding, false, numbers, threads, |_: &Job, spans| {
        let sink = |len| Decoding { codes: Aligned([0; BATCH + TILE]), level, out: out.take(len) };
        spans.iter().map(|span| span.len()).map(sink).collect()
    })
}

/// The gradients of [`fake_quantize`] to nearest.
///
/// * `grad`, `x`, `grad_x`: rows · k elements. `grad` may hold anything, infinities and NaN too.
/// * `scales`, `zero_points`: those of the forward pass, chosen or given.
/// * `grad_scales`: one a group, times 1 / √(N · Qp) of its N elements.
///
/// The result does not depend on `threads`. Errors: as [`fake_quantize`].
pub fn fake_quantize_backward(
    grad: Source<'_>,
    x: Source<'_>,
    scales: Scales<'_>,
    zero_points: ZeroPoints<'_>,
    shape: Shape,
    scheme: &Scheme,
    read_bits: u32,
    grad_x: Target<'_>,
    grad_scales: &mut [f32],
    threads: usize,
) -> Result<(), Error> {
    let rounding = &Rounding::nearest();
    check(scheme, rounding, read_bits)?;
    let numbers = Numbers::given(shape, scheme, scales, zero_points)?;
    shape.check("grad", grad.len(), shape.len())?;
    shape.check("grad_x", grad_x.len(), shape.len())?;
    shape.check("grad_scales", grad_scales.len(), shape.rows * scheme.groups(shape.k))?;
    let (mut grad_x, mut grad_scales, mut done) = (grad_x, grad_scales, 0);
    encode_spans(Token::active(), x, shape, scheme, rounding, false, numbers, threads, |_: &Job, spans| {
        let mut sinks = Vec::with_capacity(spans.len());
        for span in spans {
            sinks.push(Gradients {
                codes: Aligned([0; BATCH + TILE]),
                level: Level::new(scheme, read_bits),
                inside: Inside::new(scheme),
                qp: highest_level(scheme),
                grad: grad.part(done, span.len()),
                grad_x: grad_x.take(span.len()),
                grad_scales: take_mut(&mut grad_scales, span.total_groups()),
                done: 0,
                group: 0,
                sum: Groups::default(),
            });
            done += span.len();
        }
        sinks
    })
}
