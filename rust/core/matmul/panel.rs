//! Panels: 64 rows of the weight side by side, a row a lane, so that no sum ever crosses lanes.
//!
//! A *word* holds the codes of four columns for 16 rows: what one dot product of bytes takes. A panel is cut
//! into vectors of 16 rows and units of 8 words; expanded, it is `[unit][vector][word]`, a byte a code.
//!
//! Codes come from either layout of the weight: transposed from the canonical planes, row by row, or expanded
//! from the planes of the compute layout (see `repack.rs`), which lie in memory in this very order.

use std::ops::Range;

use half::slice::HalfBitsSliceExt;
use half::{bf16, f16};

use crate::Shape;
use crate::parallel::Span;
use crate::planes::{PlaneReader, padded};
use crate::quantize::Scales;
use crate::scheme::{MAX_PLANES, Planes, Table};
use crate::simd::amx::Prefetch;
use crate::simd::{Isa, Kernel, LANES, TILE, VECTORS};

use super::Layout;
use super::cuts::{Block, Cuts, UNIT};

/// 16 lanes in memory, by their bits.
pub(super) type Lanes = [u32; LANES];
/// The codes of four columns of 16 rows: row `r` in bytes 4·r to 4·r + 3.
pub(super) type Word = [u8; TILE];

/// Rows of a whole panel.
pub(super) const PANEL: usize = VECTORS * LANES;
/// How far ahead of the codes in use memory is asked for, in lines of all planes together: measured. One row of x
/// hurries from line to line; several leave the time to reach further.
pub(super) const fn ahead(rows: usize) -> usize {
    if rows == 1 { 64 } else { 96 }
}
/// The same for codes on their way to memory.
const AHEAD_OF_EXPANSION: usize = 24;

/// Some rows of the weight: 64 of them, or what is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Panel {
    pub(super) first: usize,
    pub(super) rows: usize,
}

impl Panel {
    /// The panels of rows `rows`, which begin at a multiple of 64.
    pub(super) fn all(rows: Range<usize>) -> impl Iterator<Item = Self> {
        let end = rows.end;
        rows.step_by(PANEL).map(move |first| Self { first, rows: PANEL.min(end - first) })
    }

    /// Vectors of 16 rows, the last one perhaps padded.
    pub(super) fn vectors(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// Rows of vector `c`.
    pub(super) fn rows_of(&self, c: usize) -> usize {
        LANES.min(self.rows - c * LANES)
    }
}

/// Zeros at first, from the beginning of a cache line on, so that no vector of them straddles two.
pub(super) struct Lines<T, const N: usize> {
    values: Vec<T>,
    begin: usize,
}

/// Words of codes.
pub(super) type AlignedWords = Lines<u8, TILE>;

impl<T: Copy + Default, const N: usize> Lines<T, N> {
    /// `lines` lines of `N` values.
    pub(super) fn new(lines: usize) -> Self {
        let values = vec![T::default(); (lines + 1) * N];
        let begin = values.as_ptr().align_offset(TILE).min(N);
        Self { values, begin }
    }

    pub(super) fn lines(&self) -> &[[T; N]] {
        self.values[self.begin..].as_chunks().0
    }

    pub(super) fn lines_mut(&mut self) -> &mut [[T; N]] {
        self.values[self.begin..].as_chunks_mut().0
    }
}

/// How expanded codes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Laid {
    /// `[unit][vector][word]`, the words of a unit together.
    Units,
    /// The same of pairs of units: `[pair][vector][word of 16]`. Half of the last pair may be anything.
    Pairs,
    /// As [`Laid::Units`], but what belongs together are the first words of a run of 16 units, then the second
    /// ones: so 16 words are together in codes that nobody has moved.
    Runs,
}

impl Laid {
    /// Words of a vector that belong together, in units.
    #[inline(always)]
    pub(super) fn together(self) -> usize {
        match self {
            Self::Units => 1,
            Self::Pairs | Self::Runs => 2,
        }
    }

    /// Words that `units` units of `vectors` vectors take.
    pub(super) fn words(self, units: usize, vectors: usize) -> usize {
        units.next_multiple_of(self.together()) * vectors * UNIT
    }

    /// The vectors side by side in memory for `units` units.
    fn width(self, units: usize, memory: &[Word]) -> usize {
        memory.len() / self.words(units, 1)
    }

    /// The first word of a unit of vector `c`.
    #[inline(always)]
    fn at(self, unit: usize, c: usize, vectors: usize) -> usize {
        let together = if self == Self::Pairs { 2 } else { 1 };
        ((unit / together * vectors + c) * together + unit % together) * UNIT
    }
}

/// The scales of a panel: `[group][vector]`, 16 rows each.
#[derive(Clone, Copy)]
pub(super) enum PanelScales<'a> {
    /// Brought from the canonical layout.
    Lanes(&'a [Lanes]),
    /// As they lie in the compute layout.
    Bf16(&'a [[bf16; LANES]]),
    F16(&'a [[f16; LANES]]),
    F32(&'a [[f32; LANES]]),
}

impl<'a> PanelScales<'a> {
    /// The scales in the compute layout from index `from` on.
    pub(super) fn stored(scales: Scales<'a>, from: usize) -> Self {
        match scales {
            Scales::Bf16(s) => Self::Bf16(s[from..].reinterpret_cast::<bf16>().as_chunks().0),
            Scales::F16(s) => Self::F16(s[from..].reinterpret_cast::<f16>().as_chunks().0),
            Scales::F32(s) => Self::F32(s[from..].as_chunks().0),
        }
    }

    /// Those of `C` vectors from number `at` on.
    #[inline(always)]
    pub(super) fn load<I: Isa, const C: usize>(&self, isa: I, at: usize) -> [I::F32; C] {
        let mut scales = [isa.splat(0.0); C];
        for c in 0..C {
            scales[c] = match self {
                Self::Lanes(s) => isa.from_bits(isa.load_i32(&s[at + c])),
                Self::Bf16(s) => isa.load_bf16(&s[at + c]),
                Self::F16(s) => isa.load_f16(&s[at + c]),
                Self::F32(s) => isa.load(&s[at + c]),
            };
        }
        scales
    }
}

/// One plane of one panel in the compute layout.
#[derive(Clone, Copy, Default)]
pub(super) struct Plane<'a> {
    width: u32,
    /// `width` vectors of bytes for each unit of each vector of rows.
    bytes: &'a [Word],
}

/// The planes of one panel in the compute layout, and what their codes stand for.
#[derive(Clone, Copy)]
pub(super) struct PanelPlanes<'a> {
    planes: [Plane<'a>; MAX_PLANES],
    count: usize,
    vectors: usize,
    table: Option<&'a Table>,
}

impl<'a> PanelPlanes<'a> {
    /// The planes of `prefix` in a blob of `total` vectors of rows.
    pub(super) fn new(
        packed: &'a [u8],
        prefix: &Planes,
        total: usize,
        units: usize,
        table: Option<&'a Table>,
        panel: Panel,
    ) -> Self {
        let mut rest = packed.as_chunks().0;
        let mut planes = [Plane::default(); MAX_PLANES];
        for (plane, width) in planes.iter_mut().zip(prefix.widths()) {
            let vector = units * *width as usize;
            let (all, behind) = rest.split_at(total * vector);
            let from = panel.first / LANES * vector;
            *plane = Plane { width: *width, bytes: &all[from..from + panel.vectors() * vector] };
            rest = behind;
        }
        Self { planes, count: prefix.widths().len(), vectors: panel.vectors(), table }
    }

    /// Widths of the planes as digits of a hexadecimal number, the first plane lowest, and [`LEVELS`] if levels are
    /// looked up: what expansion is compiled for, see [`by_stack!`].
    pub(super) fn stack(&self) -> u32 {
        let widths = self.planes[..self.count].iter().rev();
        let digits = widths.fold(0, |digits, plane| digits << 4 | plane.width);
        digits | if self.table.is_some() { LEVELS } else { 0 }
    }

    /// A unit of the `vectors` vectors of a panel whose planes are those of `STACK`.
    #[inline(always)]
    pub(super) fn unit<const STACK: u32>(&self, unit: usize, vectors: usize) -> Unit<'a> {
        let mut planes: [&[Word]; MAX_PLANES] = [&[]; MAX_PLANES];
        for (i, plane) in planes.iter_mut().enumerate() {
            let len = vectors * width_of(STACK, i);
            *plane = &self.planes[i].bytes[unit * len..][..len];
        }
        Unit { planes, table: self.table }
    }

    /// The expanded words of a block where they are what lies in memory.
    pub(super) fn as_words(&self, block: &Block) -> Option<&'a [Word]> {
        let unit = self.vectors * UNIT;
        (self.stack() == BYTES)
            .then(|| &self.planes[0].bytes[block.units.start * unit..block.units.end * unit])
    }

    /// Expands units `units` into `to`, which may be wider than the panel; a unit is a step of `ahead`.
    #[inline(always)]
    pub(super) fn expand<I: Isa>(
        &self,
        isa: I,
        units: Range<usize>,
        to: &mut [Word],
        order: Laid,
        ahead: &mut Ahead<'a>,
    ) {
        by_stack!(self.stack(), STACK => {
            isa.vectorize(Expand::<STACK> { planes: self, units, to, order, ahead });
        });
    }

    /// The bytes that follow a block's in memory: the next block's, if only by its plane.
    pub(super) fn ahead(&self, block: &Block, steps: usize) -> Ahead<'a> {
        let mut ahead = Ahead { count: self.count, ..Ahead::default() };
        for i in 0..self.count {
            let Plane { width, bytes } = self.planes[i];
            let unit = self.vectors * width as usize;
            ahead.from[i] = &bytes[block.units.start * unit..];
            ahead.next[i] = block.units.len() * unit;
            ahead.step[i] = (block.units.len() * unit).div_ceil(steps.max(1));
        }
        ahead
    }
}

/// The stack of codes of a byte each.
pub(super) const BYTES: u32 = 0x8;
/// Marks a stack whose codes are numbers of levels.
pub(super) const LEVELS: u32 = 1 << (4 * MAX_PLANES);

/// `$run` with the constant `$stack` for the planes named by `$value`, see [`PanelPlanes::stack`]: those of every
/// scheme and their prefixes, and bytes.
macro_rules! by_stack {
    ($value:expr, $stack:ident => $run:expr) => {
        by_stack!(@ $value, $stack => $run,
            0x8 0x4 0x2 0x1 0x12 0x14 0x24 0x124                        // static
            0x44 0x114 0x2114 0x112 0x1112 0x11112 0x211112             // nested
            0x1000008 0x1000004 0x1000012 0x1000002 0x1000001           // of levels
        )
    };
    (@ $value:expr, $stack:ident => $run:expr, $($n:literal)*) => {
        match $value {
            $($n => {
                const $stack: u32 = $n;
                $run
            })*
            _ => unreachable!("no scheme has other planes"),
        }
    };
}
pub(super) use by_stack;

/// Width of plane `i` of a stack, see [`PanelPlanes::stack`]; 0 behind the last.
const fn width_of(stack: u32, i: usize) -> usize {
    if i < MAX_PLANES { (stack >> (4 * i) & 15) as usize } else { 0 }
}

/// Bits of a stack's planes from number `i` on.
const fn bits_from(stack: u32, i: usize) -> usize {
    if i < MAX_PLANES { width_of(stack, i) + bits_from(stack, i + 1) } else { 0 }
}

/// Most bits of what the planes of a stack expand to: codes, or levels.
pub(super) const fn bits_of(stack: u32) -> usize {
    if stack & LEVELS == 0 { bits_from(stack, 0) } else { 8 }
}

/// Whether plane `i` of a stack is expanded with the one before it: planes of single bits go in pairs.
const fn joined(stack: u32, i: usize) -> bool {
    i > 0 && width_of(stack, i) == 1 && width_of(stack, i - 1) == 1 && !joined(stack, i - 1)
}

/// Field `i` of `width` bits of every byte, at bit `to`.
#[inline(always)]
fn field<I: Isa>(isa: I, bytes: I::U8, width: usize, i: usize, to: usize) -> I::U8 {
    let (from, mask) = (i * width, (((1u32 << width) - 1) << to) as u8);
    match width {
        8 => bytes,
        _ if from < to => isa.shl_and_u8(bytes, (to - from) as u32, mask),
        _ => isa.shr_and_u8(bytes, (from - to) as u32, mask),
    }
}

/// A unit of every vector of a panel.
#[derive(Clone, Copy)]
pub(super) struct Unit<'a> {
    /// The unit's bytes in each plane.
    planes: [&'a [Word]; MAX_PLANES],
    table: Option<&'a Table>,
}

impl Unit<'_> {
    /// The words of vector `c`, levels looked up; memory `ahead` of them is asked for, see [`ahead`].
    #[inline(always)]
    pub(super) fn words<I: Isa, const STACK: u32>(&self, isa: I, c: usize, ahead: usize) -> [I::U8; UNIT] {
        let mut words = [isa.splat_u8(0); UNIT];
        for n in 0..UNIT {
            words[n] = self.word::<I, STACK>(isa, c, n, ahead);
        }
        words
    }

    /// Word `n` of [`Unit::words`]. What several words take of memory is loaded once where `n` is a constant.
    #[inline(always)]
    pub(super) fn word<I: Isa, const STACK: u32>(&self, isa: I, c: usize, n: usize, ahead: usize) -> I::U8 {
        const { assert!(MAX_PLANES == 6) };
        // Not a loop: one of this length might not be unrolled.
        let mut word = isa.splat_u8(0);
        word = self.add_plane::<I, STACK, 0>(isa, c, n, ahead, word);
        word = self.add_plane::<I, STACK, 1>(isa, c, n, ahead, word);
        word = self.add_plane::<I, STACK, 2>(isa, c, n, ahead, word);
        word = self.add_plane::<I, STACK, 3>(isa, c, n, ahead, word);
        word = self.add_plane::<I, STACK, 4>(isa, c, n, ahead, word);
        word = self.add_plane::<I, STACK, 5>(isa, c, n, ahead, word);
        match self.table {
            Some(table) if STACK & LEVELS != 0 => look_up(isa, table, word),
            _ => word,
        }
    }

    /// Puts the field of plane `P` at its place in word `n` of vector `c`, which has zeros there.
    #[inline(always)]
    fn add_plane<I: Isa, const STACK: u32, const P: usize>(
        &self,
        isa: I,
        c: usize,
        n: usize,
        ahead: usize,
        word: I::U8,
    ) -> I::U8 {
        let width = const { width_of(STACK, P) };
        if width == 0 || const { joined(STACK, P) } {
            return word;
        }
        let at = const { bits_from(STACK, P + 1) };
        if const { joined(STACK, P + 1) } {
            if n == 0 {
                self.prefetch::<I, STACK>(isa, P, c, 0, ahead);
                self.prefetch::<I, STACK>(isa, P + 1, c, 0, ahead);
            }
            let [high, low] = [isa.load_u8(&self.planes[P][c]), isa.load_u8(&self.planes[P + 1][c])];
            // Fields of two bits: the words of even number, and those of odd.
            let fields = match n % 2 {
                0 => isa.or_u8(isa.shl_and_u8(high, 1, 0xaa), isa.shr_and_u8(low, 0, 0x55)),
                _ => isa.or_u8(isa.shr_and_u8(high, 0, 0xaa), isa.shr_and_u8(low, 1, 0x55)),
            };
            return isa.or_u8(word, field(isa, fields, 2, n / 2, at - 1));
        }
        let stacked = UNIT / width;
        let j = n / stacked;
        if n.is_multiple_of(stacked) {
            self.prefetch::<I, STACK>(isa, P, c, j, ahead);
        }
        let bytes = isa.load_u8(&self.planes[P][c * width + j]);
        isa.or_u8(word, field(isa, bytes, width, n % stacked, at))
    }

    /// Asks for the memory behind vector `j` of plane `i` of vector `c` of rows.
    #[inline(always)]
    fn prefetch<I: Isa, const STACK: u32>(&self, isa: I, i: usize, c: usize, j: usize, ahead: usize) {
        let width = width_of(STACK, i);
        let bytes = &self.planes[i][c * width + j];
        isa.prefetch(bytes, (ahead * width / const { bits_from(STACK, 0) }).max(1) * TILE);
    }
}

/// Units of a panel on their way to memory.
struct Expand<'a, 'b, const STACK: u32> {
    planes: &'a PanelPlanes<'b>,
    units: Range<usize>,
    to: &'a mut [Word],
    order: Laid,
    ahead: &'a mut Ahead<'b>,
}

impl<const STACK: u32> Kernel for Expand<'_, '_, STACK> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let vectors = self.planes.vectors;
        let width = self.order.width(self.units.len(), self.to);
        for (number, unit) in self.units.enumerate() {
            let unit = self.planes.unit::<STACK>(unit, vectors);
            self.ahead.fetch(isa);
            for c in 0..vectors {
                let to = &mut self.to[self.order.at(number, c, width)..][..UNIT];
                let words = unit.words::<I, STACK>(isa, c, AHEAD_OF_EXPANSION);
                for j in 0..UNIT {
                    isa.store_u8(&mut to[j], words[j]);
                }
            }
        }
    }
}

/// Memory to ask for a little at a time while other memory is multiplied.
#[derive(Clone, Copy, Default)]
pub(super) struct Ahead<'a> {
    from: [&'a [Word]; MAX_PLANES],
    /// The line to ask for next, counted from `from`.
    next: [usize; MAX_PLANES],
    /// Lines a step.
    step: [usize; MAX_PLANES],
    count: usize,
    /// The plane whose turn it is, where they take turns.
    turn: usize,
}

impl Ahead<'_> {
    /// The share of `steps` steps for someone else to ask for; the planes take turns.
    #[inline(always)]
    pub(super) fn take(&mut self, steps: usize) -> Prefetch {
        let i = self.turn;
        if i >= self.count {
            return Prefetch { from: std::ptr::null(), lines: 0 };
        }
        let lines = self.step[i] * self.count;
        let from = self.from[i].as_ptr().cast::<u8>().wrapping_add(self.next[i] * TILE);
        self.next[i] += lines * steps;
        self.turn = (i + 1) % self.count;
        Prefetch { from, lines }
    }

    /// One step's share.
    #[inline(always)]
    pub(super) fn fetch<I: Isa>(&mut self, isa: I) {
        for i in 0..self.count {
            for _ in 0..self.step[i] {
                if let Some(line) = self.from[i].first() {
                    isa.prefetch(line, self.next[i] * TILE);
                }
                self.next[i] += 1;
            }
        }
    }
}

/// The codes of one panel, block after block.
pub(super) enum Codes<'a> {
    /// In the canonical layout: a reader for each row.
    Canonical { readers: Vec<PlaneReader<'a>>, table: Option<&'a Table> },
    /// In the canonical layout, unpacked: rows of whole units, segments moved to their words.
    Spread { rows: Vec<u8> },
    /// In the compute layout.
    Panels(PanelPlanes<'a>),
}

impl<'a> Codes<'a> {
    /// The codes of a panel of `packed`, which holds the planes of `prefix` first; as levels of `table`.
    #[inline(always)]
    pub(super) fn open<I: Isa>(
        isa: I,
        packed: &'a [u8],
        prefix: &Planes,
        shape: Shape,
        table: Option<&'a Table>,
        layout: Layout,
        cuts: &Cuts,
        panel: Panel,
    ) -> Self {
        if layout == Layout::Panels {
            let total = shape.rows.div_ceil(LANES);
            return Self::Panels(PanelPlanes::new(packed, prefix, total, cuts.units, table, panel));
        }
        let readers = row_readers(packed, *prefix, shape, panel);
        if cuts.contiguous {
            return Self::Canonical { readers, table };
        }
        Self::Spread { rows: spread(isa, table, readers, cuts, shape.k) }
    }

    /// The planes of the compute layout.
    pub(super) fn planes(&self) -> Option<&PanelPlanes<'a>> {
        match self {
            Self::Panels(planes) => Some(planes),
            _ => None,
        }
    }

    /// Expands the next block into `to`, which may be wider than the panel; in panels a unit is a step of `ahead`.
    #[inline(always)]
    pub(super) fn expand<I: Isa>(
        &mut self,
        isa: I,
        cuts: &Cuts,
        k: usize,
        block: &Block,
        to: &mut [Word],
        order: Laid,
        ahead: &mut Ahead<'a>,
    ) {
        let units = block.units.clone();
        let width = order.width(units.len(), to);
        match self {
            Self::Panels(planes) => planes.expand(isa, units, to, order, ahead),
            Self::Canonical { readers, table } => {
                for (i, first) in units.step_by(2).enumerate() {
                    let len = TILE.min(k - first * 4 * UNIT);
                    for (c, rows) in readers.chunks_mut(LANES).enumerate() {
                        let mut lanes = [isa.splat(0.0); LANES];
                        for (lane, reader) in lanes.iter_mut().zip(rows) {
                            let codes = read_levels(isa, *table, reader, len);
                            *lane = isa.from_bits(isa.words(codes));
                        }
                        store_units(isa, &lanes, &mut to[2 * i * width * UNIT..], width, c, order);
                    }
                }
            }
            Self::Spread { rows } => {
                let stride = cuts.words() * 4;
                for (i, first) in units.step_by(2).enumerate() {
                    for (c, rows) in rows.chunks(LANES * stride).enumerate() {
                        let mut lanes = [isa.splat(0.0); LANES];
                        for (lane, row) in lanes.iter_mut().zip(rows.chunks_exact(stride)) {
                            let codes = load_padded(isa, &row[first * 4 * UNIT..]);
                            *lane = isa.from_bits(isa.words(codes));
                        }
                        store_units(isa, &lanes, &mut to[2 * i * width * UNIT..], width, c, order);
                    }
                }
            }
        }
    }
}

/// The levels that codes stand for; what lies above a table is its last level, as padding is.
#[inline(always)]
fn look_up<I: Isa>(isa: I, table: &Table, codes: I::U8) -> I::U8 {
    isa.lookup_u8(isa.shr_and_u8(codes, 0, 15), table.padded())
}

/// The next `len` codes of a row, or the levels they stand for.
#[inline(always)]
fn read_levels<I: Isa>(isa: I, table: Option<&Table>, reader: &mut PlaneReader<'_>, len: usize) -> I::U8 {
    let codes = reader.read(isa, len);
    match table {
        Some(table) => look_up(isa, table, codes),
        None => codes,
    }
}

/// A reader for each row of a panel of a packed matrix.
fn row_readers(packed: &[u8], prefix: Planes, shape: Shape, panel: Panel) -> Vec<PlaneReader<'_>> {
    let span = |row, rows| Span { row, rows, group: 0, groups: 0, begin: 0, end: shape.k };
    let rows = panel.first..panel.first + panel.rows;
    let spans: Vec<Span> = [span(0, panel.first)].into_iter().chain(rows.map(|row| span(row, 1))).collect();
    PlaneReader::cut(packed, prefix, shape, &spans).split_off(1)
}

/// Unpacks rows and moves each segment to its words.
#[inline(always)]
fn spread<I: Isa>(
    isa: I,
    table: Option<&Table>,
    mut readers: Vec<PlaneReader<'_>>,
    cuts: &Cuts,
    k: usize,
) -> Vec<u8> {
    let stride = cuts.words() * 4;
    let mut rows = vec![0; readers.len() * stride];
    let mut codes = vec![0; k.next_multiple_of(TILE)];
    for (reader, row) in readers.iter_mut().zip(rows.chunks_exact_mut(stride.max(1))) {
        for (tile, to) in codes.as_chunks_mut().0.iter_mut().enumerate() {
            let len = TILE.min(k - tile * TILE);
            isa.store_u8(to, read_levels(isa, table, reader, len));
        }
        for segment in &cuts.segments {
            let from = &codes[segment.begin..][..segment.len];
            row[4 * segment.word..][..segment.len].copy_from_slice(from);
        }
    }
    rows
}

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

/// Stores the transpose of 16 rows of 16 words as two units of vector `c`, or as one if `to` ends there.
#[inline(always)]
fn store_units<I: Isa>(
    isa: I,
    rows: &[I::F32; LANES],
    to: &mut [Word],
    vectors: usize,
    c: usize,
    order: Laid,
) {
    let words = transpose(isa, rows);
    for (unit, words) in words.as_chunks::<UNIT>().0.iter().enumerate() {
        let at = order.at(unit, c, vectors);
        if let Some(to) = to.get_mut(at..at + UNIT) {
            for j in 0..UNIT {
                isa.store_u8(&mut to[j], isa.bytes(isa.to_bits(words[j])));
            }
        }
    }
}

/// 64 bytes, zeros behind the end.
#[inline(always)]
fn load_padded<I: Isa>(isa: I, from: &[u8]) -> I::U8 {
    match from.first_chunk() {
        Some(whole) => isa.load_u8(whole),
        None => isa.load_u8(&padded(from)),
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
        for (to, column) in to.iter_mut().zip(transpose(isa, &lanes)) {
            isa.store_i32(to, isa.to_bits(column));
        }
    }
}
