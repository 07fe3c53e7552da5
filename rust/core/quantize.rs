//! Tensor to packed codes and back, each in one pass over memory.
//!
//! ```text
//! pack:    for sixteen groups at a time          (16 · 64 elements stay in L1)
//!            extremes ──fold──► scales, zero points of all sixteen
//!            elements ──coder──► codes ──► planes
//! unpack:  planes ──► codes ──► s · (v − z) ──► elements
//! ```

use std::sync::Mutex;

use crate::Shape;
use crate::error::Error;
use crate::parallel::{self, Span, group_spans};
use crate::planes::{PlaneReader, PlaneWriter, check_packed};
use crate::scheme::{Mode, Planes, Rounding, ScaleRule, Scheme};
use crate::simd::{Aligned, Isa, Kernel, LANES, TILE, Token, four};

mod buffers;
mod coders;
mod draws;
mod groups;
mod noise;
mod numbers;
mod rows;
mod scales;

use buffers::load_vector;
pub(crate) use buffers::{Element, check_groups, load_tile};
pub use buffers::{Scales, ScalesMut, Source, Target, ZeroPoints, ZeroPointsMut};
pub(crate) use coders::within_limit;
use coders::{Clamped, Coefficients, Drawn, Encode, Grid, Levels, Nearest, Sign, Systematic};
use draws::Draws;
use groups::{Batch, Choose, PreserveVariance, Search, Survey, as_f32};
pub(crate) use groups::{first_lanes, flush};
pub use noise::inject_noise;
pub use numbers::Numbers;
pub(crate) use rows::Rows;
pub(crate) use scales::{Groups, inverses};
use scales::{MAX_BITS, Rule, Sum};

/// Candidates of `scale="mse"`: multiples of the extreme scale, the first of several equals wins.
pub const MSE_MULTIPLES: [f32; 9] =
    [1.0, 63. / 64., 62. / 64., 66. / 64., 60. / 64., 68. / 64., 56. / 64., 52. / 64., 47. / 64.];

/// Outputs of at least this many bytes bypass the caches: they would evict more than they leave behind.
const STREAM_BYTES: usize = 8 << 20;

// ---- pack -------------------------------------------------------------------------------------------------

/// Why a span could not be packed; ordered so that the first input to blame is the least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Failure {
    /// Index of an element that is not a number of the domain.
    Element(usize),
    /// Number of a group whose scale overflows.
    Group(usize),
}

/// What all spans of a call share.
#[derive(Clone, Copy)]
pub(crate) struct Job {
    pub(crate) shape: Shape,
    pub(crate) scheme: Scheme,
    rounding: Rounding,
    rule: Rule,
    /// Number of the first group of the tensor, for block draws.
    first_group: u64,
}

impl Job {
    pub(crate) fn new(shape: Shape, scheme: &Scheme, rounding: &Rounding) -> Self {
        let rows_before = rounding.offset().checked_div(shape.k as u64).unwrap_or(0);
        Self {
            shape: joined(shape, scheme.group_size()),
            scheme: *scheme,
            rounding: *rounding,
            rule: Rule::new(scheme, rounding.is_stochastic()),
            first_group: rows_before * scheme.groups(shape.k) as u64,
        }
    }

    fn group_len(&self) -> usize {
        self.scheme.group_len(self.shape.k)
    }
}

/// Whether all tiles of a span that begins at logical index `first` begin at multiples of 64.
fn tiles_aligned(first: u64, span: &Span, group_len: usize) -> bool {
    let row_len = span.end - span.begin;
    let rows_aligned = span.rows == 1 || row_len.is_multiple_of(TILE);
    let groups_aligned = group_len >= row_len || group_len.is_multiple_of(TILE);
    first.is_multiple_of(TILE as u64) && rows_aligned && groups_aligned
}

/// Where codes go, a batch at a time.
pub(crate) trait Sink: Send {
    /// Memory for the codes of the next part.
    fn room(&mut self) -> &mut [u8; BATCH + TILE];

    /// Takes the codes of `part`, which lie in `room`, one group behind the other.
    fn take<I: Isa>(&mut self, isa: I, part: &Part<'_>);
}

/// Up to sixteen whole groups, or at most a batch of a single long one.
pub(crate) struct Part<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) group_len: usize,
    /// Position in its group of the first element.
    pub(crate) begin: usize,
    /// Scales and zero points of the groups.
    pub(crate) s: &'a Groups,
    pub(crate) z: &'a Groups,
    /// Whether a group, and whether the row, ends with the last element.
    pub(crate) group_ends: bool,
    pub(crate) row_ends: bool,
}

/// One span to encode.
struct EncodeSpan<'a, S> {
    job: &'a Job,
    span: Span,
    x: Source<'a>,
    nan_zero: bool,
    numbers: Numbers<'a>,
    sink: S,
}

/// Elements of a batch of groups: read twice, the second time from L1.
pub(crate) const BATCH: usize = 4096;

/// The sink of [`pack`].
struct Packing<'a> {
    codes: Codes,
    planes: PlaneWriter<'a>,
}

impl Sink for Packing<'_> {
    #[inline(always)]
    fn room(&mut self) -> &mut [u8; BATCH + TILE] {
        self.codes.room()
    }

    #[inline(always)]
    fn take<I: Isa>(&mut self, isa: I, part: &Part<'_>) {
        self.codes.len += part.x.len();
        self.codes.pack(isa, part.row_ends, &mut self.planes);
    }
}

/// Codes of a row on their way to the planes: what the last batch left over, then those of a batch.
struct Codes {
    bytes: Aligned<[u8; TILE + BATCH + TILE]>,
    len: usize,
}

impl Codes {
    fn new() -> Self {
        Self { bytes: Aligned([0; TILE + BATCH + TILE]), len: 0 }
    }

    /// Room for a batch, behind what is waiting.
    fn room(&mut self) -> &mut [u8; BATCH + TILE] {
        let room = self.bytes.0[self.len..].first_chunk_mut();
        room.expect("less than a tile is left over")
    }

    /// Packs whole tiles; at the `end` of the row also what is left.
    #[inline(always)]
    fn pack<I: Isa>(&mut self, isa: I, end: bool, planes: &mut PlaneWriter<'_>) {
        let len = if end { self.len } else { self.len / TILE * TILE };
        if end {
            self.bytes.0[len..len.next_multiple_of(TILE)].fill(0);
        }
        let (tiles, _) = self.bytes.0.as_chunks::<TILE>();
        isa.vectorize(WriteTiles { planes, tiles: &tiles[..len.div_ceil(TILE)], len });
        self.bytes.0.copy_within(len..len + TILE, 0);
        self.len -= len;
    }
}

/// The coder of a call, chosen once a span.
enum AnyCoder {
    Nearest(Nearest),
    Clamped(Clamped),
    Sign(Sign),
    Levels(Levels),
    Drawn(Box<Drawn<false>>),
    DrawnPlain(Box<Drawn<true>>),
    Systematic(Box<Systematic<false>>),
    SystematicPlain(Box<Systematic<true>>),
}

impl AnyCoder {
    /// `given`: the scales are somebody else's choice and may clip any element.
    fn new(job: &Job, given: bool, aligned: bool) -> Self {
        let Job { scheme, rounding, .. } = job;
        let group_len = job.group_len();
        match (rounding.mode(), scheme.table()) {
            (Mode::Nearest, Some(table)) => Self::Levels(Levels::new(table.levels())),
            (Mode::Nearest, None) if scheme.bits() == 1 => Self::Sign(Sign),
            (Mode::Nearest, None) if given => Self::Clamped(Clamped(Nearest::new(scheme))),
            (Mode::Nearest, None) => Self::Nearest(Nearest::new(scheme)),
            (Mode::Systematic, _) if Grid::new(scheme).is_plain() => {
                Self::SystematicPlain(Box::new(Systematic::new(scheme, rounding, group_len)))
            }
            (Mode::Systematic, _) => Self::Systematic(Box::new(Systematic::new(scheme, rounding, group_len))),
            _ => {
                let draws = Draws::new(rounding, aligned);
                if Drawn::<true>::is_plain(scheme, rounding, &draws) {
                    Self::DrawnPlain(Box::new(Drawn::new(scheme, rounding, group_len, draws)))
                } else {
                    Self::Drawn(Box::new(Drawn::new(scheme, rounding, group_len, draws)))
                }
            }
        }
    }
}

impl<S: Sink> Kernel for EncodeSpan<'_, S> {
    type Output = Result<(), Failure>;

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) -> Self::Output {
        let group_len = self.job.group_len();
        let batch_len = (BATCH / group_len).clamp(1, LANES) * group_len;
        let row_len = self.span.end - self.span.begin;
        let aligned = tiles_aligned(self.logical(0), &self.span, group_len);
        let mut coder = AnyCoder::new(self.job, self.numbers.are_given(), aligned);
        let mut scratch = Vec::new();
        let mut numbers = Batch::default();
        let mut group = 0;
        for row in (0..self.x.len()).step_by(row_len) {
            for first in (row..row + row_len).step_by(batch_len) {
                let end = row + row_len.min(first - row + batch_len);
                let batch = as_f32(isa, self.x.part(first, end - first), self.nan_zero, &mut scratch);
                self.choose(isa, &mut numbers, batch, first, group)?;
                // More than one part only if there is one group, a long one.
                for (part, x) in batch.chunks(BATCH).enumerate() {
                    let begin = part * BATCH;
                    self.encode(isa, &mut coder, x, begin, &numbers, first, group);
                    let (s, z) = (&numbers.s, &numbers.z);
                    let (group_ends, row_ends) =
                        (begin + x.len() == batch.len(), first + begin + x.len() == row + row_len);
                    self.sink.take(isa, &Part { x, group_len, begin, s, z, group_ends, row_ends });
                }
                if self.job.rounding.preserve_variance() {
                    self.preserve_variance(isa, batch, &mut numbers);
                }
                let count = batch.len().div_ceil(group_len);
                self.numbers.store(group, &numbers.s[..count], &numbers.z[..count]);
                group += count;
            }
        }
        Ok(())
    }
}

impl<S: Sink> EncodeSpan<'_, S> {
    /// Logical index of element `at` of the span.
    fn logical(&self, at: usize) -> u64 {
        let first = self.span.row * self.job.shape.k + self.span.begin;
        self.job.rounding.offset() + (first + at) as u64
    }

    /// Encodes a batch, whose first group is number `group` of the span and begins at element `first`.
    #[inline(always)]
    fn encode<I: Isa>(
        &mut self,
        isa: I,
        coder: &mut AnyCoder,
        x: &[f32],
        begin: usize,
        numbers: &Batch,
        first: usize,
        group: usize,
    ) {
        let group_len = self.job.group_len();
        let number = self.job.first_group + self.group_number(group) as u64;
        let first = self.logical(first);
        let codes = self.sink.room();
        macro_rules! encode {
            ($coder:expr) => {
                isa.vectorize(Encode {
                    coder: $coder,
                    x,
                    group_len,
                    begin,
                    coefficients: &numbers.coefficients,
                    number,
                    first,
                    codes,
                })
            };
        }
        match coder {
            AnyCoder::Nearest(coder) => encode!(coder),
            AnyCoder::Clamped(coder) => encode!(coder),
            AnyCoder::Sign(coder) => encode!(coder),
            AnyCoder::Levels(coder) => encode!(coder),
            AnyCoder::Drawn(coder) => encode!(&mut **coder),
            AnyCoder::DrawnPlain(coder) => encode!(&mut **coder),
            AnyCoder::Systematic(coder) => encode!(&mut **coder),
            AnyCoder::SystematicPlain(coder) => encode!(&mut **coder),
        }
    }

    /// Number in the tensor of a group of the span.
    fn group_number(&self, group: usize) -> usize {
        self.span.row * self.job.scheme.groups(self.job.shape.k) + self.span.group + group
    }

    /// Scales and zero points of up to sixteen groups: the elements from `first`, the groups from `group` on.
    #[inline(always)]
    fn choose<I: Isa>(
        &self,
        isa: I,
        numbers: &mut Batch,
        batch: &[f32],
        first: usize,
        group: usize,
    ) -> Result<(), Failure> {
        let Job { scheme, rule, .. } = self.job;
        let group_len = self.job.group_len();
        let sum = if self.numbers.are_given() { Sum::None } else { rule.sum() };
        if !isa.vectorize(Survey { batch: numbers, x: batch, group_len, sum }) {
            return Err(self.blame(batch, first));
        }
        if let Numbers::Given(scales, zero_points) = &self.numbers {
            let constant = scheme.zero_point().unwrap_or(0.0);
            for i in 0..batch.len().div_ceil(group_len) {
                numbers.s[i] = scales.get(group + i);
                numbers.z[i] = zero_points.get(group + i, constant);
            }
            numbers.coefficients = Coefficients::new(&numbers.s, &numbers.z);
            return Ok(());
        }
        if !isa.vectorize(Choose { batch: numbers, rule: *rule, scheme }) {
            let i = numbers.s.iter().position(|s| !s.is_finite()).unwrap_or(0);
            return Err(Failure::Group(self.group_number(group + i)));
        }
        if scheme.scale() == ScaleRule::Mse && scheme.bits() > 1 {
            let Batch { s, z, coefficients, .. } = numbers;
            for (i, x) in batch.chunks(group_len).enumerate() {
                if s[i] != 0.0 {
                    s[i] = isa.vectorize(Search { x, scheme, s: s[i], z: z[i] });
                }
            }
            *coefficients = Coefficients::new(s, z);
        }
        Ok(())
    }

    /// Scales and zero points of a batch that keep the variance of its groups.
    #[inline(always)]
    fn preserve_variance<I: Isa>(&self, isa: I, batch: &[f32], numbers: &mut Batch) {
        let Batch { s, z, .. } = numbers;
        let group_len = self.job.group_len();
        for (i, x) in batch.chunks(group_len).enumerate() {
            let kernel = PreserveVariance { x, scheme: &self.job.scheme, s: s[i], z: z[i] };
            (s[i], z[i]) = isa.vectorize(kernel);
        }
    }

    /// The first element of `batch` outside the domain.
    #[cold]
    fn blame(&self, batch: &[f32], first: usize) -> Failure {
        let outside = |x: &f32| x.to_bits() & i32::MAX as u32 > MAX_BITS;
        let at = batch.iter().position(outside).unwrap_or(0);
        Failure::Element(self.span.row * self.job.shape.k + self.span.begin + first + at)
    }
}

/// Codes to planes, compiled once for all coders.
struct WriteTiles<'a, 'b> {
    planes: &'a mut PlaneWriter<'b>,
    tiles: &'a [[u8; TILE]],
    len: usize,
}

impl Kernel for WriteTiles<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        self.planes.write(isa, self.tiles, self.len);
    }
}

/// What is wrong with element `index`.
fn element_error(x: Source<'_>, index: usize) -> Error {
    let value = x.get(index);
    if value.is_nan() {
        Error::Nan(index)
    } else if value.is_infinite() {
        Error::Infinite(index)
    } else {
        Error::Domain { index, value }
    }
}

/// Quantizes a tensor and packs its codes, in one pass over memory.
///
/// * `x`: rows · k elements, row-major.
/// * `planes`: the scheme's planes, or [`Planes::BYTES`] for unpacked codes (then this is `quantize`).
/// * `nan_zero`: NaN counts as 0 instead of being an error.
/// * `packed`: `planes.nbytes(rows, k)` bytes; `scales`: rows · `scheme.groups(k)` of the scheme's type.
/// * `zero_points`: as many u8 if the scheme is asymmetric, f32 if the rounding preserves the variance,
///   else [`ZeroPointsMut::Constant`].
///
/// The result does not depend on `threads`. Errors: lengths and kinds of the buffers, rounding against scheme,
/// and the first element that is NaN, infinite or outside ±2^120; the outputs' content is then unspecified.
pub fn pack(
    x: Source<'_>,
    shape: Shape,
    scheme: &Scheme,
    rounding: &Rounding,
    planes: &Planes,
    nan_zero: bool,
    packed: &mut [u8],
    scales: ScalesMut<'_>,
    zero_points: ZeroPointsMut<'_>,
    threads: usize,
) -> Result<(), Error> {
    pack_on(
        Token::active(),
        x,
        shape,
        scheme,
        rounding,
        planes,
        nan_zero,
        packed,
        scales,
        zero_points,
        threads,
    )
}

/// [`pack`] on a given instruction set.
pub(crate) fn pack_on(
    isa: Token,
    x: Source<'_>,
    shape: Shape,
    scheme: &Scheme,
    rounding: &Rounding,
    planes: &Planes,
    nan_zero: bool,
    packed: &mut [u8],
    scales: ScalesMut<'_>,
    zero_points: ZeroPointsMut<'_>,
    threads: usize,
) -> Result<(), Error> {
    check_groups(shape, scheme, rounding, scales.view(), zero_points.view())?;
    let numbers = Numbers::Chosen(scales, zero_points);
    pack_numbers(isa, x, shape, scheme, rounding, planes, nan_zero, packed, numbers, threads)
}

/// Packs the codes of a tensor on scales and zero points that are given: [`pack`], to nearest, without the choice.
///
/// Errors besides those of [`pack`]: a scale that is NaN, infinite or subnormal, a zero point beyond the codes.
pub fn encode(
    x: Source<'_>,
    shape: Shape,
    scheme: &Scheme,
    planes: &Planes,
    packed: &mut [u8],
    scales: Scales<'_>,
    zero_points: ZeroPoints<'_>,
    threads: usize,
) -> Result<(), Error> {
    let (isa, rounding) = (Token::active(), &Rounding::nearest());
    let numbers = Numbers::given(shape, scheme, scales, zero_points)?;
    pack_numbers(isa, x, shape, scheme, rounding, planes, false, packed, numbers, threads)
}

fn pack_numbers(
    isa: Token,
    x: Source<'_>,
    shape: Shape,
    scheme: &Scheme,
    rounding: &Rounding,
    planes: &Planes,
    nan_zero: bool,
    packed: &mut [u8],
    numbers: Numbers<'_>,
    threads: usize,
) -> Result<(), Error> {
    shape.check("packed", packed.len(), planes.nbytes(shape.rows, shape.k))?;
    encode_spans(isa, x, shape, scheme, rounding, nan_zero, numbers, threads, |job, spans| {
        let writers = PlaneWriter::cut(packed, *planes, job.shape, spans).into_iter();
        writers.map(|planes| Packing { codes: Codes::new(), planes }).collect()
    })
}

/// Chooses scales unless they are given, and hands the codes of x, span by span, to the sinks that `sinks` makes:
/// one for each span.
pub(crate) fn encode_spans<S: Sink>(
    isa: Token,
    x: Source<'_>,
    shape: Shape,
    scheme: &Scheme,
    rounding: &Rounding,
    nan_zero: bool,
    mut numbers: Numbers<'_>,
    threads: usize,
    sinks: impl FnOnce(&Job, &[Span]) -> Vec<S>,
) -> Result<(), Error> {
    rounding.check(scheme, shape.k)?;
    shape.check("x", x.len(), shape.len())?;
    let job = Job::new(shape, scheme, rounding);
    let spans = group_spans(job.shape, scheme, threads);
    let mut first = 0;
    let task = |(sink, span): (S, &Span)| {
        let x = x.part(first, span.len());
        first += span.len();
        let numbers = numbers.take(span.total_groups());
        EncodeSpan { job: &job, span: *span, x, nan_zero, numbers, sink }
    };
    let tasks = sinks(&job, &spans).into_iter().zip(&spans).map(task).collect();
    let failure = Mutex::new(None::<Failure>);
    parallel::for_each(threads, tasks, |task: EncodeSpan<'_, S>| {
        if let Err(found) = isa.run(task)
            && let Ok(mut first) = failure.lock()
        {
            *first = Some(first.map_or(found, |other| other.min(found)));
        }
    });
    match failure.into_inner() {
        Ok(Some(Failure::Element(index))) => Err(element_error(x, index)),
        Ok(Some(Failure::Group(group))) => Err(Error::ScaleOverflow { group, dtype: scheme.scale_dtype() }),
        _ => Ok(()),
    }
}

/// The shape to work on: rows of whole groups in whole bytes follow each other like groups of one long row.
fn joined(shape: Shape, group: usize) -> Shape {
    let whole = group != 0 && shape.k.is_multiple_of(group) && shape.k.is_multiple_of(8);
    if whole { Shape { rows: 1, k: shape.len() } } else { shape }
}

// ---- unpack -----------------------------------------------------------------------------------------------

/// What all spans of a call share.
#[derive(Clone, Copy)]
struct Reading {
    shape: Shape,
    scheme: Scheme,
    rounding: Rounding,
    /// Bits below those read.
    dropped: u32,
    stream: bool,
}

/// One span to unpack.
struct UnpackSpan<'a> {
    job: &'a Reading,
    span: Span,
    planes: PlaneReader<'a>,
    scales: Scales<'a>,
    zero_points: ZeroPoints<'a>,
    out: Target<'a>,
}

/// Codes read ahead of decoding.
const PENDING: usize = 16 * TILE;

/// Codes of a row on their way from the planes.
struct Decoded {
    bytes: Aligned<[u8; PENDING + TILE]>,
    at: usize,
    len: usize,
    /// Codes of the row that are still in the planes.
    left: usize,
}

impl Decoded {
    /// The next `len` codes, at most 64.
    #[inline(always)]
    fn next<I: Isa>(&mut self, isa: I, len: usize, planes: &mut PlaneReader<'_>) -> I::U8 {
        if self.at + len > self.len {
            self.refill(isa, planes);
        }
        let tile = self.bytes.0[self.at..].first_chunk::<TILE>();
        self.at += len;
        isa.load_u8(tile.unwrap_or(&[0; TILE]))
    }

    #[inline(always)]
    fn refill<I: Isa>(&mut self, isa: I, planes: &mut PlaneReader<'_>) {
        self.bytes.0.copy_within(self.at..self.len, 0);
        self.len -= self.at;
        self.at = 0;
        while self.left > 0 && self.len + TILE <= PENDING {
            let count = self.left.min(TILE);
            let codes = planes.read(isa, count);
            if let Some(to) = self.bytes.0[self.len..].first_chunk_mut::<TILE>() {
                isa.store_u8(to, codes);
            }
            self.len += count;
            self.left -= count;
        }
    }
}

impl Kernel for UnpackSpan<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { job, span, mut planes, scales, zero_points, mut out } = self;
        let Reading { shape, scheme, rounding, dropped, stream } = job;
        let group_len = scheme.group_len(shape.k);
        let row_len = span.end - span.begin;
        let constant = scheme.zero_point().unwrap_or(0.0);
        let unit = isa.splat((1u32 << dropped) as f32);
        let centre = isa.splat(((1u32 << dropped) as f32 - 1.0) / 2.0);
        let first = rounding.offset() + (span.row * shape.k + span.begin) as u64;
        let aligned = tiles_aligned(first, &span, group_len);
        let mut dither = (rounding.mode() == Mode::Subtractive).then(|| Draws::new(rounding, aligned));
        let wide = rounding.draw_bits() == 32;
        let table = scheme.table().map(|table| *table.padded());
        let mut group = 0;
        let mut done = 0;
        for _ in 0..span.rows {
            let mut codes = Decoded { bytes: Aligned([0; PENDING + TILE]), at: 0, len: 0, left: row_len };
            for begin in (0..row_len).step_by(group_len) {
                let s = isa.splat(scales.get(group));
                let z = isa.splat(zero_points.get(group, constant));
                group += 1;
                let len = group_len.min(row_len - begin);
                for at in (0..len).step_by(TILE) {
                    let count = (len - at).min(TILE);
                    let mut tile = codes.next(isa, count, &mut planes);
                    if let Some(table) = &table {
                        tile = isa.lookup_u8(tile, table);
                    }
                    let k = isa.widen(tile);
                    let mut v = four!(j => {
                        let k = isa.mul(isa.to_f32(k[j]), unit);
                        isa.sub(isa.add(k, centre), z)
                    });
                    if let Some(draws) = &mut dither {
                        let index = first + done as u64;
                        if !draws.covers(index, count) {
                            draws.cover(isa, index, BATCH.min(span.len() - done));
                        }
                        let draw = draws.tile(isa, index);
                        v = four!(j => isa.add(v[j], dither_of(isa, wide, draw[j])));
                    }
                    out.push(isa, *stream, count, four!(j => isa.mul(s, v[j])));
                    done += count;
                }
            }
        }
        if *stream {
            isa.fence();
        }
    }
}

/// The dither that a draw stands for: ½ − (draw + ½ unit), in steps.
#[inline(always)]
fn dither_of<I: Isa>(isa: I, wide: bool, draw: I::I32) -> I::F32 {
    let word = if wide {
        isa.or(draw, isa.splat_i32(1))
    } else {
        isa.or(isa.shl::<16>(draw), isa.splat_i32(0x8000))
    };
    let distance = isa.sub_i32(isa.splat_i32(i32::MIN), word);
    isa.mul(isa.to_f32(distance), isa.splat(1.0 / (1u64 << 32) as f32))
}

/// Unpacks and dequantizes, in one pass over memory.
///
/// * `packed`: the whole blob of `planes`, or the prefix of it that holds the planes read.
/// * `scales`, `zero_points`: as [`pack`] wrote them.
/// * `rounding`: matters for subtractive dither, which is regenerated, and for the kind of `zero_points`.
/// * `read_bits`: a prefix of the planes; the scheme's bits reads all, also of [`Planes::BYTES`].
/// * `out`: rows · k elements.
///
/// The result does not depend on `threads`. Errors: lengths and kinds of the buffers, a prefix that the planes
/// or the scheme do not have.
pub fn unpack(
    packed: &[u8],
    scales: Scales<'_>,
    zero_points: ZeroPoints<'_>,
    shape: Shape,
    scheme: &Scheme,
    rounding: &Rounding,
    planes: &Planes,
    read_bits: u32,
    out: Target<'_>,
    threads: usize,
) -> Result<(), Error> {
    let isa = Token::active();
    unpack_on(isa, packed, scales, zero_points, shape, scheme, rounding, planes, read_bits, out, threads)
}

/// [`unpack`] on a given instruction set.
pub(crate) fn unpack_on(
    isa: Token,
    packed: &[u8],
    scales: Scales<'_>,
    zero_points: ZeroPoints<'_>,
    shape: Shape,
    scheme: &Scheme,
    rounding: &Rounding,
    planes: &Planes,
    read_bits: u32,
    out: Target<'_>,
    threads: usize,
) -> Result<(), Error> {
    check_groups(shape, scheme, rounding, scales, zero_points)?;
    let prefix = readable(scheme, rounding, planes, read_bits)?;
    check_packed(packed, shape, planes, &prefix)?;
    shape.check("out", out.len(), shape.len())?;
    let shape = joined(shape, scheme.group_size());
    let dropped = scheme.bits() - read_bits;
    let stream = out.nbytes() >= STREAM_BYTES;
    let job = Reading { shape, scheme: *scheme, rounding: *rounding, dropped, stream };
    let spans = group_spans(shape, scheme, threads);
    let (mut scales, mut zero_points, mut out) = (scales, zero_points, out);
    let readers = PlaneReader::cut(packed, prefix, shape, &spans);
    let tasks = readers.into_iter().zip(&spans).map(|(planes, span)| {
        let groups = span.total_groups();
        let (scales, zero_points) = (scales.take(groups), zero_points.take(groups));
        UnpackSpan { job: &job, span: *span, planes, scales, zero_points, out: out.take(span.len()) }
    });
    parallel::for_each(threads, tasks.collect(), |task| isa.run(task));
    Ok(())
}

/// The planes to read for `read_bits` bits of a tensor of `scheme`.
pub(crate) fn readable(
    scheme: &Scheme,
    rounding: &Rounding,
    planes: &Planes,
    read_bits: u32,
) -> Result<Planes, Error> {
    let full = read_bits == scheme.bits();
    let whole_only = if scheme.table().is_some() {
        Some("level tables")
    } else if rounding.mode() == Mode::Subtractive {
        Some("subtractive dither")
    } else {
        None
    };
    match whole_only {
        Some(what) if !full => Err(Error::Scheme(format!(
            "tensors with {what} are read in full only: {} bits, got {read_bits}",
            scheme.bits()
        ))),
        _ if *planes == Planes::BYTES && full => Ok(*planes),
        _ => planes.prefix(read_bits),
    }
}
