//! A site's small files as they are in the midst of its work, for a daemon that dies right
//! there: at a call that syncs, before that does anything, or elsewhere.
//!
//! Work cannot be ended at a call, it goes on to its next wait. What it writes
//! until then comes too late: the files are put back as they were.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::*;

/// What the one real thread of a daemon writes, whenever it gets to it.
const NOT_OF_WORK: [&str; 4] = ["events", "alerts.json", "alerts.json.new", "scrub"];

/// Called when the moment has come, by the thread that syncs.
type Dies = Box<dyn FnOnce() + Send>;

/// A site that is to die at a sync.
struct Doomed {
    root: PathBuf,
    /// How many syncs it has left.
    syncs: u32,
    dies: Dies,
}

static DOOMED: Mutex<Vec<Doomed>> = Mutex::new(Vec::new());

/// The site whose directory this is dies at its `nth` sync of a small file or a directory
/// from now on. `dies` is told then.
pub fn die_at(root: &Path, nth: u32, dies: impl FnOnce() + Send + 'static) {
    spare(root);
    DOOMED.lock().unwrap().push(Doomed {
        root: root.to_owned(),
        syncs: nth,
        dies: Box::new(dies),
    });
}

/// It does not die at a sync any more.
pub fn spare(root: &Path) {
    DOOMED.lock().unwrap().retain(|doomed| doomed.root != root);
}

/// Something of a site's is about to be synced.
pub(super) fn syncs(path: &Path) {
    let mut all = DOOMED.lock().unwrap();
    let is_of = |doomed: &Doomed| {
        let below = path.strip_prefix(&doomed.root);
        below.is_ok_and(|below| NOT_ITS_OWN.iter().all(|not| !below.starts_with(not)))
    };
    let Some(at) = all.iter().position(is_of) else {
        return;
    };
    all[at].syncs -= 1;
    if all[at].syncs == 0 {
        let doomed = all.swap_remove(at);
        drop(all);
        (doomed.dies)();
    }
}

/// The small files of a site at one moment, and what of them was durable then.
pub struct Moment {
    files: Files,
    synced: Synced,
}

type Files = BTreeMap<OsString, Node>;

enum Node {
    File(u64, Vec<u8>),
    Directory(u64, Files),
}

/// What is there now.
pub fn moment(root: &Path) -> Moment {
    let files = read(root, is_of_work).unwrap();
    let synced = SYNCED.lock().unwrap();
    Moment {
        files,
        synced: synced.clone(),
    }
}

/// Puts that back. Nothing runs in the directory any more.
pub fn put_back(root: &Path, moment: &Moment) {
    let mut synced = SYNCED.lock().unwrap();
    synced.put_back(root, moment).unwrap();
}

fn is_of_work(name: &OsString) -> bool {
    NOT_ITS_OWN
        .iter()
        .chain(&NOT_OF_WORK)
        .all(|not| name != not)
}

fn read(at: &Path, wanted: fn(&OsString) -> bool) -> io::Result<Files> {
    let mut files = Files::new();
    let names = names(at)?.into_iter();
    for (name, Entry { inode, directory }) in names.filter(|(name, _)| wanted(name)) {
        let path = at.join(&name);
        let node = match directory {
            true => Node::Directory(inode, read(&path, |_| true)?),
            false => Node::File(inode, fs::read(&path)?),
        };
        files.insert(name, node);
    }
    Ok(files)
}

/// Makes them; which inode each has instead of the one that it had.
fn make(at: &Path, files: &Files, now: &mut HashMap<u64, u64>) -> io::Result<()> {
    for (name, node) in files {
        let path = at.join(name);
        let before = match node {
            Node::File(inode, bytes) => {
                write(&path, bytes)?;
                inode
            }
            Node::Directory(inode, files) => {
                fs::DirBuilder::new().mode(0o700).create(&path)?;
                make(&path, files, now)?;
                inode
            }
        };
        now.insert(*before, fs::metadata(&path)?.ino());
    }
    Ok(())
}

impl Synced {
    fn put_back(&mut self, root: &Path, moment: &Moment) -> io::Result<()> {
        for (name, entry) in names(root)? {
            let path = root.join(&name);
            match entry.directory {
                _ if !is_of_work(&name) => {}
                true => fs::remove_dir_all(path)?,
                false => fs::remove_file(path)?,
            }
        }
        let mut now = HashMap::new();
        make(root, &moment.files, &mut now)?;
        let now = |inode: u64| now.get(&inode).copied().unwrap_or(inode);
        for (inode, bytes) in &moment.synced.files {
            self.files.insert(now(*inode), bytes.clone());
        }
        let at_root = fs::metadata(root)?.ino();
        let kept = self.directories.remove(&at_root).unwrap_or_default();
        for (inode, names) in &moment.synced.directories {
            let names = names.iter();
            let names = names.map(|(name, inode)| (name.clone(), now(*inode)));
            self.directories.insert(now(*inode), names.collect());
        }
        let of_root = self.directories.entry(at_root).or_default();
        of_root.retain(|name, _| is_of_work(name));
        of_root.extend(kept.into_iter().filter(|(name, _)| !is_of_work(name)));
        Ok(())
    }
}
