//! Scales and zero points of a call: chosen, or given.

use super::buffers::check_groups;
use super::{Scales, ScalesMut, ZeroPoints, ZeroPointsMut};
use crate::Shape;
use crate::error::Error;
use crate::scheme::{Rounding, Scheme};

/// Where the scales and zero points of the groups come from.
#[derive(Debug)]
pub enum Numbers<'a> {
    /// Chosen by the rule of the scheme and written here.
    Chosen(ScalesMut<'a>, ZeroPointsMut<'a>),
    /// Somebody else's choice, which may clip.
    Given(Scales<'a>, ZeroPoints<'a>),
}

impl<'a> Numbers<'a> {
    /// Scales and zero points to encode with. Errors: buffers that do not fit the scheme, a scale that no rule
    /// makes (NaN, infinite, subnormal), a zero point beyond the last code.
    pub fn given(
        shape: Shape,
        scheme: &Scheme,
        scales: Scales<'a>,
        zero_points: ZeroPoints<'a>,
    ) -> Result<Self, Error> {
        check_groups(shape, scheme, &Rounding::nearest(), scales, zero_points)?;
        let last = f32::from(scheme.last_code());
        for group in 0..scales.len() {
            let (scale, zero_point) = (scales.get(group), zero_points.get(group, 0.0));
            if !scale.is_normal() && scale != 0.0 {
                return Err(Error::GivenScale { group, scale });
            }
            if zero_point > last {
                return Err(Error::GivenZeroPoint { group, zero_point, last });
            }
        }
        Ok(Self::Given(scales, zero_points))
    }

    /// Refuses buffers that do not fit.
    pub(crate) fn check(&self, shape: Shape, scheme: &Scheme, rounding: &Rounding) -> Result<(), Error> {
        match self {
            Self::Chosen(s, z) => check_groups(shape, scheme, rounding, s.view(), z.view()),
            Self::Given(s, z) => check_groups(shape, scheme, rounding, *s, *z),
        }
    }

    pub(super) fn are_given(&self) -> bool {
        matches!(self, Self::Given(..))
    }

    /// The part of the next `groups` groups.
    pub(super) fn take(&mut self, groups: usize) -> Self {
        match self {
            Self::Chosen(s, z) => Self::Chosen(s.take(groups), z.take(groups)),
            Self::Given(s, z) => Self::Given(s.take(groups), z.take(groups)),
        }
    }

    /// Keeps what was chosen for the groups from `at` on.
    #[inline(always)]
    pub(super) fn store(&mut self, at: usize, s: &[f32], z: &[f32]) {
        if let Self::Chosen(scales, zero_points) = self {
            scales.store(at, s);
            zero_points.store(at, z);
        }
    }
}
