//! One variant a cause. Each message is one sentence: the cause, the numbers, the way out.

use crate::scheme::ScaleDtype;

/// What can be wrong with a call. Nothing here is fatal: the caller's memory is intact, but the content of
/// the outputs is unspecified.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `bits` outside 1…8.
    #[error("bits must be an integer from 1 to 8, got {0}; use 4 (the default) or 8")]
    Bits(u32),
    /// `group_size` of 1…7.
    #[error("group_size must be at least 8, got {0}; use 32, 64, 128 or None (one scale a row)")]
    GroupSize(usize),
    /// Two fields of the scheme contradict each other.
    #[error("{0}")]
    Scheme(String),
    /// The rounding contradicts itself or the scheme.
    #[error("{0}")]
    Rounding(String),
    /// Widths of planes that no scheme has.
    #[error("planes {planes:?} do not store {bits} bits; use {valid}")]
    Planes {
        /// The widths given, most significant first.
        planes: Vec<u32>,
        /// Bits of the scheme.
        bits: u32,
        /// The widths that would do.
        valid: String,
    },
    /// A prefix that does not end at a plane boundary.
    #[error("cannot read {read_bits} bits of planes {planes:?}; readable are {valid:?}")]
    ReadBits {
        /// Bits asked for.
        read_bits: u32,
        /// Widths of the planes, most significant first.
        planes: Vec<u32>,
        /// Prefix sums of the widths.
        valid: Vec<u32>,
    },
    /// A buffer of the wrong length.
    #[error("{name} has {got} elements where rows={rows}, k={k} need {need}; allocate {need}")]
    Length {
        /// Which argument.
        name: &'static str,
        /// Its length.
        got: usize,
        /// The length the shape implies.
        need: usize,
        /// Rows of the tensor.
        rows: usize,
        /// Length of a row.
        k: usize,
    },
    /// A buffer of the wrong type.
    #[error("{name} must be {need}, got {got}")]
    Kind {
        /// Which argument.
        name: &'static str,
        /// The type given.
        got: &'static str,
        /// The type the scheme needs.
        need: &'static str,
    },
    /// Not a number in the input.
    #[error("x[{0}] is NaN; use nan=\"zero\" to treat NaN as 0")]
    Nan(usize),
    /// Infinity in the input.
    #[error("x[{0}] is infinite; clamp the tensor to ±2^120 first")]
    Infinite(usize),
    /// A finite value outside ±2^120.
    #[error("x[{index}] = {value:e} is outside the domain |x| <= 2^120; rescale the tensor")]
    Domain {
        /// Position in row-major order.
        index: usize,
        /// The value.
        value: f64,
    },
    /// The scale of a group does not fit its type.
    #[error("the scale of group {group} exceeds the largest finite {dtype} value; {}", wider(*dtype))]
    ScaleOverflow {
        /// Number of the group, row by row.
        group: usize,
        /// The type of the scales.
        dtype: ScaleDtype,
    },
    /// A scale to encode with that no rule makes.
    #[error("the given scale of group {group} is {scale:e}; scales are finite, and 0 or at least 2^-126")]
    GivenScale {
        /// Number of the group, row by row.
        group: usize,
        /// The scale.
        scale: f32,
    },
    /// A zero point to encode with that is no code.
    #[error("the given zero point of group {group} is {zero_point}, above the last code {last}")]
    GivenZeroPoint {
        /// Number of the group, row by row.
        group: usize,
        /// The zero point.
        zero_point: f32,
        /// 2^bits − 1.
        last: f32,
    },
    /// Noise of no width.
    #[error("the noise width of group {group} is {width:e}; widths are finite and at least 0")]
    NoiseWidth {
        /// Number of the group, row by row.
        group: usize,
        /// The width.
        width: f32,
    },
    /// Block draws of a tensor that does not begin at a row.
    #[error("offset {offset} is not a multiple of the row length {k}; rounding {mode} counts whole rows")]
    Offset {
        /// Logical index of the first element.
        offset: u64,
        /// Length of a row.
        k: usize,
        /// Name of the rounding mode.
        mode: &'static str,
    },
    /// An instruction set that this CPU or this build does not have.
    #[error("instruction set {name:?} is not available here; this CPU has {available:?}")]
    Isa {
        /// The name asked for.
        name: String,
        /// The names that would do.
        available: Vec<&'static str>,
    },
    /// A table of costs and scores that is no table of items and choices.
    #[error("{costs} costs and {scores} scores make no table of {choices} choices an item")]
    Table {
        /// Number of costs.
        costs: usize,
        /// Number of scores.
        scores: usize,
        /// Choices of an item.
        choices: usize,
    },
    /// A score that cannot be compared.
    #[error("the score of item {item}, choice {choice} is NaN or infinite; measure it again")]
    Score {
        /// Which item.
        item: usize,
        /// Which of its choices.
        choice: usize,
    },
    /// Less than the cheapest choices cost.
    #[error("a budget of {budget} is infeasible: the choices cost from {least} to {most}; raise it")]
    Budget {
        /// What may be spent.
        budget: u64,
        /// What the cheapest choices cost together.
        least: u64,
        /// What the dearest choices cost together.
        most: u64,
    },
}

/// What to do where scales of a type overflow.
fn wider(dtype: ScaleDtype) -> &'static str {
    match dtype {
        ScaleDtype::F16 => "use scale_dtype=\"bf16\", which has the range of f32",
        // Sums over a group may leave the range of f32 where none of its elements does.
        ScaleDtype::Bf16 | ScaleDtype::F32 => "rescale the tensor",
    }
}
