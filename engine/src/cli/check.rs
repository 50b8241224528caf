//! `generate --check`: an answer beside the whole model's, with the same codec and without one.

use std::fmt;

use hat_engine::Metrics;
use hat_engine::options::Codec;
use serde_json::json;

/// Result of the comparison.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Check {
    wire: Codec,
    /// The same token ids and the same bits of all logits as the whole model with this codec.
    same: bool,
    /// The first token that the whole model with this codec does not say.
    unlike_whole: Option<usize>,
    /// The first token that the whole model with f32 rows does not say.
    unlike_f32: Option<usize>,
    /// Arithmetic ids of the answer and of the whole model.
    arithmetics: [Vec<u32>; 2],
}

impl Check {
    /// Compares `answer`, whose rows went through `wire`, with what `whole` answers with a codec.
    pub(crate) fn of(
        wire: Codec,
        answer: &Metrics,
        mut whole: impl FnMut(Codec) -> anyhow::Result<Metrics>,
    ) -> anyhow::Result<Self> {
        let yardstick = whole(wire)?;
        let unlike_whole = first_unlike(&answer.token_ids, &yardstick.token_ids);
        let unlike_f32 = match wire {
            Codec::F32 => unlike_whole,
            _ => first_unlike(&answer.token_ids, &whole(Codec::F32)?.token_ids),
        };
        let hashed = answer.logits_blake3.is_some();
        let same_logits = hashed && answer.logits_blake3 == yardstick.logits_blake3;
        let ids = |metrics: &Metrics| metrics.timings.arithmetic_ids.clone();
        Ok(Self {
            wire,
            same: unlike_whole.is_none() && same_logits,
            unlike_whole,
            unlike_f32,
            arithmetics: [ids(answer), ids(&yardstick)],
        })
    }

    /// Fields for the object of `--json`. Tokens count from 0, as in `token_ids`.
    pub(crate) fn json(&self) -> serde_json::Value {
        json!({
            "wire": self.wire.name(),
            "same_as_whole": self.same,
            "first_token_unlike_whole": self.unlike_whole,
            "first_token_unlike_f32": self.unlike_f32,
        })
    }

    /// # Errors
    /// If the answer is not the whole model's with the same codec.
    pub(crate) fn verdict(&self) -> anyhow::Result<()> {
        let wire = self.wire.name();
        let [here, whole] = &self.arithmetics;
        anyhow::ensure!(
            self.same || here == whole,
            "the answer is not the whole model's with {wire} rows: it was computed in arithmetics \
             {here:?}, the whole model in {whole:?}; --processor chooses that of the whole model"
        );
        anyhow::ensure!(self.same, "the answer is not the whole model's with {wire} rows");
        Ok(())
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wire = self.wire.name();
        let same = match (self.same, self.unlike_whole) {
            (true, _) => "yes".to_owned(),
            (false, Some(at)) => format!("no, from token {at} on"),
            (false, None) => "no, the tokens are the same and the logits are not".to_owned(),
        };
        writeln!(f, "same as the whole model with {wire} rows: {same}")?;
        match self.unlike_f32 {
            Some(at) => write!(f, "first token that differs from f32 rows: {at}"),
            None => write!(f, "first token that differs from f32 rows: none"),
        }
    }
}

/// The first place where two lists differ, the end of the shorter one included.
fn first_unlike(one: &[u32], other: &[u32]) -> Option<usize> {
    let common = one.iter().zip(other).take_while(|(one, other)| one == other).count();
    (common < one.len().max(other.len())).then_some(common)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(token_ids: &[u32], logits: Option<&str>) -> Metrics {
        let mut metrics = Metrics::default();
        metrics.token_ids = token_ids.to_vec();
        metrics.logits_blake3 = logits.map(str::to_owned);
        metrics
    }

    fn checked(wire: Codec, [here, coded, plain]: [&Metrics; 3]) -> Check {
        let whole = |codec| Ok(if codec == wire { coded.clone() } else { plain.clone() });
        Check::of(wire, here, whole).unwrap()
    }

    #[test]
    fn token_ids_and_logits_are_both_compared() {
        let same = answer(&[1, 2, 3], Some("a"));
        let others = [
            (answer(&[1, 2, 3], Some("b")), None),
            (answer(&[1, 2, 3], None), None),
            (answer(&[1, 2], Some("a")), Some(2)),
            (answer(&[4, 2, 3], Some("a")), Some(0)),
        ];
        let check = checked(Codec::Int8, [&same, &same, &same]);
        assert!(check.verdict().is_ok());
        assert_eq!(
            check.to_string(),
            "same as the whole model with int8 rows: yes\n\
             first token that differs from f32 rows: none"
        );
        for (other, at) in &others {
            let check = checked(Codec::Int8, [other, &same, &same]);
            assert!(check.verdict().is_err(), "{other:?}");
            assert_eq!((check.unlike_whole, check.unlike_f32), (*at, *at));
            assert_eq!(check.json()["same_as_whole"], false);
        }
        // Nothing was hashed on either side: nothing is proved.
        let check = checked(Codec::F16, [&others[1].0, &others[1].0, &same]);
        assert!(check.verdict().is_err());
    }

    #[test]
    fn f32_rows_may_say_something_else() {
        let [here, plain] = [&[1, 2, 3][..], &[1, 5, 6]].map(|ids| answer(ids, Some("a")));
        let check = checked(Codec::Int4, [&here, &here, &plain]);
        assert!(check.verdict().is_ok());
        assert_eq!(check.json()["first_token_unlike_f32"], 1);
        // Then f32 is the codec, and asked once.
        let whole = |codec| {
            assert_eq!(codec, Codec::F32);
            Ok(plain.clone())
        };
        assert_eq!(Check::of(Codec::F32, &here, whole).unwrap().unlike_f32, Some(1));
    }
}
