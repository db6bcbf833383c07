//! Says what two snapshots differ in.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::inspect::{MAX_SETS, inner};
use super::read::stopped;
use super::work::{Buffers, Job};
use super::{CHUNK, Chain, Extents, Hash, PAGE, ReadError, Region, Work};
use crate::{Record, RecordSet};

/// What differs between two snapshots, of which one is *before* and one is *after*.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Difference {
    /// Values of the configuration, by path.
    pub config: Vec<ConfigChange>,
    /// Records, by owner.
    pub records: Vec<RecordChange>,
    /// Pages per region; `None` if the two have not the same regions, so that nothing can be compared.
    pub memory: Option<Vec<Extents>>,
}

impl Difference {
    /// Whether nothing differs.
    #[must_use]
    pub fn is_none(&self) -> bool {
        let same = |memory: &Vec<Extents>| memory.iter().all(|extents| extents.ranges().is_empty());
        self.config.is_empty() && self.records.is_empty() && self.memory.as_ref().is_some_and(same)
    }
}

/// A value of the configuration that is not the same.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ConfigChange {
    /// Where it is: `disks[0].path`; empty for all of it.
    pub path: String,
    /// What it was; `None` if it was not there.
    pub before: Option<Value>,
    /// What it is; `None` if it is not there.
    pub after: Option<Value>,
}

/// A record that is not the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RecordChange {
    /// Whose it is; those of sets in sets joined by slashes.
    pub owner: String,
    /// What was there.
    pub before: Option<Described>,
    /// What is there.
    pub after: Option<Described>,
}

/// A record without its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Described {
    /// What it describes.
    pub kind: String,
    /// In which version.
    pub version: u16,
    /// Bytes of its content.
    pub bytes: u64,
}

impl Described {
    fn of(record: &Record) -> Self {
        Self { kind: record.kind.clone(), version: record.version, bytes: record.bytes.len() as u64 }
    }
}

/// Compares two snapshots. Chunks that the two are known to share are not read; what is read is verified.
///
/// # Errors
/// As [`Chain::load`].
pub fn diff(before: &Chain, after: &Chain, work: &Work<'_>) -> Result<Difference, ReadError> {
    let places = |chain: &Chain| chain.regions().iter().map(Region::place).collect::<Vec<_>>();
    let comparable = places(before) == places(after);
    Ok(Difference {
        config: config_changes(&before.manifest().config, &after.manifest().config),
        records: record_changes(before.state()?, after.state()?),
        memory: comparable.then(|| memory(before, after, work)).transpose()?,
    })
}

fn memory(a: &Chain, b: &Chain, work: &Work<'_>) -> Result<Vec<Extents>, ReadError> {
    let pages: Mutex<Vec<Vec<Range<u64>>>> = Mutex::new(a.regions().iter().map(|_| Vec::new()).collect());
    let find = |region: usize, from: u64| {
        Ok([a.next_chunk(region, from), b.next_chunk(region, from)].into_iter().flatten().min())
    };
    let each = |job: Job, buffers: &mut Buffers| {
        if same_chunk(a, b, job) {
            return Ok(());
        }
        let mut other = Buffers::default();
        a.read_chunk(job, buffers)?;
        b.read_chunk(job, &mut other)?;
        let start = job.chunk * CHUNK;
        let pairs = buffers.chunk.chunks(PAGE as usize).zip(other.chunk.chunks(PAGE as usize));
        let mut pages = pages.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pages) = pages.get_mut(job.region) {
            let starts = (start..).step_by(PAGE as usize);
            let changed = pairs.zip(starts).filter(|((a, b), _)| a != b);
            pages.extend(changed.map(|(_, start)| start..start + PAGE));
        }
        Ok(())
    };
    work.run(&a.sizes(), &find, &each).map_err(stopped)?;
    let pages = pages.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(pages.iter().map(|pages| Extents::covering(pages, u64::MAX).unwrap_or_default()).collect())
}

/// Whether a chunk is the same by what the tables say.
fn same_chunk(a: &Chain, b: &Chain, job: Job) -> bool {
    let (left, right) = (a.sources(job), b.sources(job));
    let one = |sources: &[(Hash, Option<Hash>)]| sources.len() == 1;
    // Either the same snapshots made it, or it is whole in one file on each side.
    left == right || (one(&left) && one(&right) && left.first().map(|l| l.1) == right.first().map(|r| r.1))
}

fn record_changes(before: RecordSet, after: RecordSet) -> Vec<RecordChange> {
    let (before, mut after) = (leaves(before), leaves(after));
    let mut changes = Vec::new();
    for (owner, old) in before {
        let new = after.remove(&owner);
        if new.as_ref() != Some(&old) {
            let new = new.as_ref().map(Described::of);
            changes.push(RecordChange { owner, before: Some(Described::of(&old)), after: new });
        }
    }
    let added = after.iter().map(|(owner, new)| RecordChange {
        owner: owner.clone(),
        before: None,
        after: Some(Described::of(new)),
    });
    changes.extend(added);
    changes.sort_by(|a, b| a.owner.cmp(&b.owner));
    changes
}

/// Bytes that all names of what differs may take beside what is in the files: long names that many things have in common are not
/// repeated for each of them then.
const MOST_NAMES: usize = 16 << 20;

/// The records that are no sets, or sets with nothing to be opened.
fn leaves(set: RecordSet) -> BTreeMap<String, Record> {
    let (mut all, mut room) = (BTreeMap::new(), MOST_NAMES);
    let mut sets = vec![(String::new(), set, MAX_SETS)];
    while let Some((prefix, set, depth)) = sets.pop() {
        for (owner, record) in set.iter() {
            let owner = format!("{prefix}{owner}");
            match inner(record, depth).filter(|set| !set.is_empty() && has_room(&mut room, &owner, set.len()))
            {
                Some(set) => sets.push((format!("{owner}/"), set, depth - 1)),
                None => {
                    all.insert(owner, record.clone());
                }
            }
        }
    }
    all
}

/// Whether `name` may be repeated so often; takes the room for it then.
fn has_room(room: &mut usize, name: &str, times: usize) -> bool {
    let left = name.len().checked_mul(times).and_then(|bytes| room.checked_sub(bytes));
    *room = left.unwrap_or(*room);
    left.is_some()
}

fn config_changes(before: &RawValue, after: &RawValue) -> Vec<ConfigChange> {
    if before.get() == after.get() {
        return Vec::new();
    }
    let (mut changes, mut room) = (Vec::new(), MOST_NAMES);
    match (serde_json::from_str(before.get()), serde_json::from_str(after.get())) {
        (Ok(before), Ok(after)) => {
            compare(String::new(), Some(&before), Some(&after), (&mut changes, &mut room));
        }
        // Nested deeper than serde_json goes: no two such texts are looked into.
        _ => changes.push(ConfigChange { path: String::new(), before: None, after: None }),
    }
    changes
}

/// As deep as the values, which serde_json bounds.
fn compare(
    path: String,
    before: Option<&Value>,
    after: Option<&Value>,
    (changes, room): (&mut Vec<ConfigChange>, &mut usize),
) {
    match (before, after) {
        _ if before == after => {}
        (Some(Value::Object(old)), Some(Value::Object(new)))
            if has_room(room, &path, old.len().saturating_add(new.len())) =>
        {
            let added = new.keys().filter(|key| !old.contains_key(*key));
            for key in old.keys().chain(added) {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                compare(path, old.get(key), new.get(key), (changes, room));
            }
        }
        (Some(Value::Array(old)), Some(Value::Array(new)))
            if has_room(room, &path, old.len().max(new.len())) =>
        {
            for index in 0..old.len().max(new.len()) {
                let path = format!("{path}[{index}]");
                compare(path, old.get(index), new.get(index), (changes, room));
            }
        }
        _ => changes.push(ConfigChange { path, before: before.cloned(), after: after.cloned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NoState;

    /// Small files, in which many things have a long name in common.
    #[test]
    fn names_take_no_more_room_than_they_may() {
        let raw = |items: &str| {
            RawValue::from_string(format!(r#"{{"{}":[{items}],"b":[{items}]}}"#, "a".repeat(1 << 16)))
                .unwrap()
        };
        let found = config_changes(&raw(""), &raw(&vec!["0"; 1000].join(",")));
        assert_eq!(found.len(), 1001, "one for what has the long name");
        let owners = |owner: &str| {
            let mut inner = RecordSet::new();
            for number in 0..1000 {
                inner.put(&number.to_string(), &NoState {}).unwrap();
            }
            let mut set = RecordSet::new();
            set.put(owner, &inner).unwrap();
            leaves(set).len()
        };
        assert_eq!((owners(&"a".repeat(1 << 16)), owners("b")), (1, 1000));
    }

    #[test]
    fn configurations_differ_by_path() {
        let raw = |text: &str| RawValue::from_string(text.to_owned()).unwrap();
        let of = |before, after| {
            let text = |value: Option<Value>| value.map_or("-".to_owned(), |value| value.to_string());
            config_changes(&raw(before), &raw(after))
                .into_iter()
                .map(|change| format!("{}: {} {}", change.path, text(change.before), text(change.after)))
                .collect::<Vec<_>>()
        };
        assert_eq!(of(r#"{"a":1,"b":[2]}"#, r#"{ "b":[2], "a":1 }"#), [""; 0]);
        let before = r#"{"cpus":{"boot":1},"disks":[{"path":"a"}],"rng":null}"#;
        let after = r#"{"cpus":{"boot":2},"disks":[{"path":"a"},{}],"net":[]}"#;
        let expected = ["cpus.boot: 1 2", "disks[1]: - {}", "rng: null -", "net: - []"];
        assert_eq!(of(before, after), expected);
        assert_eq!(of("1", "[1]"), [": 1 [1]"]);
        let deep = |end: &str| format!("{}{end}{}", "[".repeat(200), "]".repeat(200));
        assert_eq!(of(&deep("1"), &deep("2")), [": - -"]);
    }

    #[test]
    fn records_differ_by_owner_in_sets_of_sets() {
        let set = |owners: &[&str]| {
            let mut set = RecordSet::new();
            owners.iter().for_each(|owner| set.put(owner, &NoState {}).unwrap());
            set
        };
        let vm = |devices: &[&str], version: u16| {
            let mut vm = set(&["clock"]);
            vm.put("devices", &set(devices)).unwrap();
            vm.insert("cpu", Record { kind: "cpu".to_owned(), version, bytes: Vec::new() }).unwrap();
            vm
        };
        assert_eq!(record_changes(vm(&["a"], 1), vm(&["a"], 1)), []);
        let changes = record_changes(vm(&["a", "b"], 1), vm(&["a", "c"], 2));
        let owners: Vec<_> = changes.iter().map(|change| change.owner.as_str()).collect();
        assert_eq!(owners, ["cpu", "devices/b", "devices/c"]);
        assert_eq!(changes[0].after.as_ref().unwrap().version, 2);
        assert_eq!((&changes[1].after, &changes[2].before), (&None, &None));
    }

    #[test]
    fn sets_are_opened_as_deep_as_promised() {
        let mut set = RecordSet::new();
        set.put("end", &NoState {}).unwrap();
        for _ in 0..MAX_SETS + 4 {
            let mut outer = RecordSet::new();
            outer.put("s", &set).unwrap();
            set = outer;
        }
        let owners: Vec<_> = leaves(set).into_keys().collect();
        assert_eq!(owners, [vec!["s"; MAX_SETS + 1].join("/")]);
    }
}
