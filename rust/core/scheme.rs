//! Scheme, rounding and planes: what a packed tensor is, and the ranges of every field.

use std::fmt;

use crate::error::Error;

/// Rule that chooses the scale of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleRule {
    /// The element farthest from zero decides.
    Extreme,
    /// Multiples of the extreme scale are searched for the smallest squared error.
    Mse,
    /// The root mean square decides (level tables of Lloyd and Max).
    Rms,
}

/// Type of the stored scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleDtype {
    /// bfloat16: the range of f32, the default.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl fmt::Display for ScaleDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        })
    }
}

/// Levels that are not equally spaced, as ascending bytes of a grid whose zero is 128.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Table {
    levels: [u8; 16],
    len: usize,
}

impl Table {
    /// The grid values, ascending.
    pub fn levels(&self) -> &[u8] {
        &self.levels[..self.len]
    }

    /// All 16 slots; those past the end repeat the last level.
    pub(crate) fn padded(&self) -> &[u8; 16] {
        &self.levels
    }
}

/// How a group of elements becomes codes and a scale.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scheme {
    bits: u32,
    group_size: usize,
    symmetric: bool,
    nested: bool,
    table: Option<Table>,
    scale: ScaleRule,
    scale_dtype: ScaleDtype,
}

/// Zero point of every level table.
pub(crate) const TABLE_ZERO: f32 = 128.0;
/// Zero point of nested schemes.
pub(crate) const NESTED_ZERO: f32 = 136.0;

impl Scheme {
    /// A checked scheme.
    ///
    /// `group_size` 0 is one group a row. `table` is empty for uniform levels, else 2 to `2^bits` ascending
    /// bytes. Errors: bits outside 1…8, a group size of 1…7, and combinations without a meaning.
    pub fn new(
        bits: u32,
        group_size: usize,
        symmetric: bool,
        nested: bool,
        table: &[u8],
        scale: ScaleRule,
        scale_dtype: ScaleDtype,
    ) -> Result<Self, Error> {
        if !(1..=8).contains(&bits) {
            return Err(Error::Bits(bits));
        }
        if (1..8).contains(&group_size) {
            return Err(Error::GroupSize(group_size));
        }
        let refuse = |why: &str| Err(Error::Scheme(why.to_owned()));
        if bits == 1 && !symmetric {
            return refuse("one-bit codes are symmetric only; use symmetric=True or bits >= 2");
        }
        if nested && bits != 8 {
            return refuse(&format!("nested schemes have 8 bits, got {bits}; use bits=8 and read a prefix"));
        }
        if nested && (!symmetric || !table.is_empty() || scale != ScaleRule::Extreme) {
            return refuse(
                "nested schemes are symmetric and uniform with scale \"extreme\"; use a static scheme instead",
            );
        }
        if table.is_empty() && scale == ScaleRule::Rms {
            return refuse("scale \"rms\" belongs to level tables; use \"extreme\" or \"mse\"");
        }
        let table = if table.is_empty() { None } else { Some(Self::check_table(table, bits, symmetric)?) };
        Ok(Self { bits, group_size, symmetric, nested, table, scale, scale_dtype })
    }

    fn check_table(levels: &[u8], bits: u32, symmetric: bool) -> Result<Table, Error> {
        let refuse = |why: String| Err(Error::Scheme(why));
        if bits > 4 || !symmetric {
            return refuse(format!(
                "level tables need bits <= 4 and symmetric=True, got bits={bits}, symmetric={symmetric}"
            ));
        }
        if levels.len() < 2 || levels.len() > 1 << bits {
            return refuse(format!(
                "a table of {bits} bits has 2 to {} levels, got {}; drop levels or add bits",
                1 << bits,
                levels.len()
            ));
        }
        if levels.windows(2).any(|pair| pair[0] >= pair[1]) {
            return refuse(format!(
                "levels must ascend on the 256-step grid, got {levels:?}; remove duplicates"
            ));
        }
        let mut padded = [levels[levels.len() - 1]; 16];
        padded[..levels.len()].copy_from_slice(levels);
        Ok(Table { levels: padded, len: levels.len() })
    }

    /// Bits a code.
    pub fn bits(&self) -> u32 {
        self.bits
    }

    /// The largest code: 2^bits − 1.
    pub fn last_code(&self) -> u8 {
        (u32::MAX >> (32 - self.bits)) as u8
    }

    /// Elements a group; 0 is the whole row.
    pub fn group_size(&self) -> usize {
        self.group_size
    }

    /// Whether the zero point is a constant of the scheme.
    pub fn symmetric(&self) -> bool {
        self.symmetric
    }

    /// Whether prefixes are near-optimal codes.
    pub fn nested(&self) -> bool {
        self.nested
    }

    /// Level table, if the levels are not uniform.
    pub fn table(&self) -> Option<&Table> {
        self.table.as_ref()
    }

    /// Rule of the scale.
    pub fn scale(&self) -> ScaleRule {
        self.scale
    }

    /// Type of the scales.
    pub fn scale_dtype(&self) -> ScaleDtype {
        self.scale_dtype
    }

    /// Length of a full group in rows of `k` elements (at least 1).
    pub fn group_len(&self, k: usize) -> usize {
        if self.group_size == 0 { k.max(1) } else { self.group_size }
    }

    /// Groups a row of `k` elements.
    pub fn groups(&self, k: usize) -> usize {
        k.div_ceil(self.group_len(k))
    }

    /// The zero point that the scheme itself fixes; `None` if every group stores one.
    pub fn zero_point(&self) -> Option<f32> {
        match (self.table, self.nested, self.symmetric, self.bits) {
            (Some(_), ..) => Some(TABLE_ZERO),
            (_, true, ..) => Some(NESTED_ZERO),
            (_, _, false, _) => None,
            (_, _, _, 1) => Some(0.5),
            (.., bits) => Some((1u32 << (bits - 1)) as f32),
        }
    }
}

/// How an element picks one of its two neighbouring codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// To nearest, ties to even.
    Nearest,
    /// An independent draw an element.
    Iid,
    /// Pairs of elements share a draw and its complement.
    Antithetic,
    /// Blocks of 8 elements have one draw in every eighth.
    Stratified,
    /// One random phase a block of 64 elements.
    Systematic,
    /// Independent draws, subtracted again when decoding.
    Subtractive,
}

impl Mode {
    /// Name as in the file format.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nearest => "nearest",
            Self::Iid => "iid",
            Self::Antithetic => "antithetic",
            Self::Stratified => "stratified",
            Self::Systematic => "systematic",
            Self::Subtractive => "subtractive",
        }
    }

    /// The mode of that name.
    pub fn from_name(name: &str) -> Result<Self, Error> {
        const ALL: [Mode; 6] = [
            Mode::Nearest,
            Mode::Iid,
            Mode::Antithetic,
            Mode::Stratified,
            Mode::Systematic,
            Mode::Subtractive,
        ];
        ALL.into_iter().find(|mode| mode.name() == name).ok_or_else(|| {
            Error::Rounding(format!("unknown rounding {name:?}; use one of {:?}", ALL.map(Mode::name)))
        })
    }
}

/// Rounding with everything its random bits depend on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rounding {
    mode: Mode,
    seed: u64,
    step: u32,
    stream: u32,
    draw_bits: u32,
    shrink: u32,
    preserve_variance: bool,
    offset: u64,
}

/// `shrink` of full randomness: ρ = 1 in units of 2^−16.
pub(crate) const FULL_RANDOMNESS: u32 = 1 << 16;

impl Rounding {
    /// Round to nearest, ties to even.
    pub const fn nearest() -> Self {
        Self {
            mode: Mode::Nearest,
            seed: 0,
            step: 0,
            stream: 0,
            draw_bits: 16,
            shrink: FULL_RANDOMNESS,
            preserve_variance: false,
            offset: 0,
        }
    }

    /// A checked rounding.
    ///
    /// `stream` is the CRC-32 of the stream's name, `draw_bits` 16 or 32, `variance` ρ in 0…1, `offset` the
    /// logical index of the tensor's first element (slices of a tensor draw the bits of the whole).
    pub fn new(
        mode: Mode,
        seed: u64,
        step: u32,
        stream: u32,
        draw_bits: u32,
        variance: f32,
        preserve_variance: bool,
        offset: u64,
    ) -> Result<Self, Error> {
        if draw_bits != 16 && draw_bits != 32 {
            return Err(Error::Rounding(format!("draw_bits must be 16 or 32, got {draw_bits}")));
        }
        if !(0.0..=1.0).contains(&variance) {
            return Err(Error::Rounding(format!("variance must be within 0 to 1, got {variance}")));
        }
        if mode == Mode::Subtractive && (variance != 1.0 || preserve_variance) {
            return Err(Error::Rounding(
                "subtractive dither has a variance of its own; use variance=1.0 and preserve=\"mean\""
                    .to_owned(),
            ));
        }
        if mode == Mode::Nearest && preserve_variance {
            return Err(Error::Rounding(
                "preserve=\"mean+var\" needs stochastic rounding; nearest has no variance to correct"
                    .to_owned(),
            ));
        }
        // Exact in f32: a product with a power of two.
        let shrink = (variance * FULL_RANDOMNESS as f32).round_ties_even() as u32;
        Ok(Self { mode, seed, step, stream, draw_bits, shrink, preserve_variance, offset })
    }

    /// The mode.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Whether any random bits are drawn.
    pub fn is_stochastic(&self) -> bool {
        self.mode != Mode::Nearest
    }

    /// Key of the generator.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Step of the training run.
    pub fn step(&self) -> u32 {
        self.step
    }

    /// CRC-32 of the stream's name.
    pub fn stream(&self) -> u32 {
        self.stream
    }

    /// Random bits an element.
    pub fn draw_bits(&self) -> u32 {
        self.draw_bits
    }

    /// ρ in units of 2^−16.
    pub(crate) fn shrink(&self) -> u32 {
        self.shrink
    }

    /// Whether each group is rescaled to keep its variance.
    pub fn preserve_variance(&self) -> bool {
        self.preserve_variance
    }

    /// Logical index of the first element.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Refuses what this rounding cannot do with `scheme`.
    pub(crate) fn check(&self, scheme: &Scheme, k: usize) -> Result<(), Error> {
        let refuse = |why: &str| Err(Error::Rounding(why.to_owned()));
        if !self.is_stochastic() {
            return Ok(());
        }
        if scheme.nested() {
            return refuse(
                "nested schemes round to nearest only; use a static scheme for stochastic rounding",
            );
        }
        if scheme.table().is_some() {
            return refuse("level tables round to nearest only; use uniform levels for stochastic rounding");
        }
        if scheme.scale() == ScaleRule::Mse {
            return refuse(
                "stochastic rounding never clips, so scale \"mse\" has no use; use scale=\"extreme\"",
            );
        }
        if self.preserve_variance && scheme.bits() < 2 {
            return refuse("preserve=\"mean+var\" needs bits >= 2, got 1; use preserve=\"mean\"");
        }
        let blocks = matches!(self.mode, Mode::Stratified | Mode::Systematic);
        if blocks && k > 0 && !self.offset.is_multiple_of(k as u64) {
            return Err(Error::Offset { offset: self.offset, k, mode: self.mode.name() });
        }
        Ok(())
    }
}

/// Most planes a stack has.
pub const MAX_PLANES: usize = 6;

/// Widths of the bit planes, most significant first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planes {
    widths: [u32; MAX_PLANES],
    len: usize,
}

/// Planes of the nested schemes.
const NESTED_PLANES: [&[u32]; 3] = [&[4, 4], &[4, 1, 1, 2], &[2, 1, 1, 1, 1, 2]];

impl Planes {
    /// One byte a code: the layout of unpacked codes of any number of bits.
    pub const BYTES: Self = Self { widths: [8, 0, 0, 0, 0, 0], len: 1 };

    /// The static planes of `bits`: one plane a set bit of the number.
    pub fn of_bits(bits: u32) -> Self {
        debug_assert!((1..=8).contains(&bits));
        let mut planes = Self { widths: [0; MAX_PLANES], len: 0 };
        for width in [8, 4, 2, 1].into_iter().filter(|width| bits & width != 0) {
            planes.widths[planes.len] = width;
            planes.len += 1;
        }
        planes
    }

    /// Planes that store codes on their own: static or nested widths, or `[8]`.
    pub fn new(widths: &[u32]) -> Result<Self, Error> {
        let bits: u32 = widths.iter().fold(0, |sum, width| sum.saturating_add(*width));
        let refuse = |valid: String| Err(Error::Planes { planes: widths.to_vec(), bits, valid });
        if !(1..=8).contains(&bits) {
            return refuse("widths of 8, 4, 2 and 1 that sum to 1…8".to_owned());
        }
        let planes = Self::of_bits(bits);
        if planes.widths() == widths {
            return Ok(planes);
        }
        if !NESTED_PLANES.contains(&widths) {
            let nested = if bits == 8 { " or one of [4, 4], [4, 1, 1, 2], [2, 1, 1, 1, 1, 2]" } else { "" };
            return refuse(format!("{:?}{nested}", planes.widths()));
        }
        let mut planes = Self { widths: [0; MAX_PLANES], len: widths.len() };
        planes.widths[..widths.len()].copy_from_slice(widths);
        Ok(planes)
    }

    /// Planes for codes of `scheme`: its static widths, the nested ones if it is nested, or `[8]` (bytes).
    pub fn for_scheme(widths: &[u32], scheme: &Scheme) -> Result<Self, Error> {
        if widths == [8] {
            return Ok(Self::BYTES);
        }
        let fixed = Self::of_bits(scheme.bits());
        if let Ok(planes) = Self::new(widths)
            && planes.bits() == scheme.bits()
            && (scheme.nested() || planes == fixed)
        {
            return Ok(planes);
        }
        let valid = if scheme.nested() {
            "[4, 4], [4, 1, 1, 2], [2, 1, 1, 1, 1, 2] or [8]".to_owned()
        } else {
            format!("{:?} or [8]", fixed.widths())
        };
        Err(Error::Planes { planes: widths.to_vec(), bits: scheme.bits(), valid })
    }

    /// The widths, most significant first.
    pub fn widths(&self) -> &[u32] {
        &self.widths[..self.len]
    }

    /// Sum of the widths.
    pub fn bits(&self) -> u32 {
        self.widths().iter().sum()
    }

    /// The numbers of bits that end at a plane boundary.
    pub fn prefixes(&self) -> Vec<u32> {
        self.widths()
            .iter()
            .scan(0, |sum, width| {
                *sum += width;
                Some(*sum)
            })
            .collect()
    }

    /// The planes that hold the top `read_bits` bits.
    pub fn prefix(&self, read_bits: u32) -> Result<Self, Error> {
        match self.prefixes().iter().position(|sum| *sum == read_bits) {
            Some(last) => Ok(Self { widths: self.widths, len: last + 1 }),
            None => {
                Err(Error::ReadBits { read_bits, planes: self.widths().to_vec(), valid: self.prefixes() })
            }
        }
    }

    /// Bytes of the blob of `rows` rows of `k` codes.
    pub fn nbytes(&self, rows: usize, k: usize) -> usize {
        self.widths().iter().map(|width| rows * row_bytes(k, *width)).sum()
    }
}

/// Bytes of one row of a plane: `k` fields of `width` bits, padded to a byte.
pub(crate) fn row_bytes(k: usize, width: u32) -> usize {
    k.div_ceil(8 / width as usize)
}
