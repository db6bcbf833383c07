//! A private apt: packages of any Debian release, fetched into the cache, with nothing of the machine changed.
//!
//! The archive is the one that the machine's own apt sources name (or `$VMM_DEBIAN_MIRROR`), with the release's name
//! changed. List, state and cache folders are our own; the machine's apt configuration (proxies and so on) is kept, its hooks
//! are not run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::run::run;

/// After this long the package lists are fetched again.
const LISTS_AGE: Duration = Duration::from_secs(24 * 3600);
/// Where Debian keeps the keys of its archive.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The Debian releases that tests use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suite {
    /// Debian 12.
    Bookworm,
    /// Debian 13.
    Trixie,
    /// Newer packages for Debian 13, together with its own.
    TrixieBackports,
}

impl Suite {
    /// Its name in an archive.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
            Self::TrixieBackports => "trixie-backports",
        }
    }

    /// The release that this one adds to.
    fn base(self) -> Option<Self> {
        match self {
            Self::Bookworm | Self::Trixie => None,
            Self::TrixieBackports => Some(Self::Trixie),
        }
    }
}

/// An archive: where it is and which keys sign it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// The URI that an apt source names.
    pub uri: String,
    /// The keyring, if a source names one as a file.
    pub keyring: PathBuf,
}

impl Mirror {
    /// The Debian archive for this machine: `$VMM_DEBIAN_MIRROR`, else the one in apt's sources, else, on a machine of
    /// another kind (Ubuntu), the one that its own package of debootstrap knows.
    ///
    /// # Errors
    /// [`Error::NoDebianMirror`] when there is none.
    pub fn of_this_machine(cache: &Cache) -> Result<Self> {
        if let Ok(uri) = std::env::var("VMM_DEBIAN_MIRROR") {
            return Ok(Self { uri, keyring: PathBuf::from(KEYRING) });
        }
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        match find_mirror(&machine_sources(), &release) {
            Some(mirror) => Ok(mirror),
            None => Self::of_debootstrap(cache),
        }
    }

    /// Debootstrap's archive and Debian's keys, from the machine's packages, which are unpacked in the cache.
    fn of_debootstrap(cache: &Cache) -> Result<Self> {
        let folder = cache.entry("debootstrap", "1", |folder| {
            let packages = ["debootstrap", "debian-archive-keyring"];
            run(Command::new("apt-get").arg("download").args(packages).current_dir(folder))?;
            debs(folder)?.iter().try_for_each(|deb| extract(deb, folder))
        })?;
        // Not all UTF-8: it names its authors.
        let program = fs::read(folder.join("usr/sbin/debootstrap")).unwrap_or_default();
        let uri = parse_debootstrap(&String::from_utf8_lossy(&program)).ok_or(Error::NoDebianMirror)?;
        Ok(Self { uri, keyring: folder.join(KEYRING.trim_start_matches('/')) })
    }

    /// One line of a source list for `suite`.
    #[must_use]
    pub fn source_line(&self, suite: Suite) -> String {
        format!("deb [signed-by={}] {} {} main", self.keyring.display(), self.uri, suite.name())
    }
}

/// An apt with its own lists, state and cache for one release.
#[derive(Debug)]
pub struct PrivateApt {
    config: PathBuf,
    suite: Suite,
}

impl PrivateApt {
    /// Sets it up in `cache`, and fetches the package lists unless that was done within a day.
    ///
    /// # Errors
    /// When no Debian archive is known or apt fails.
    pub fn open(cache: &Cache, suite: Suite) -> Result<Self> {
        let mirror = Mirror::of_this_machine(cache)?;
        let _lock = cache.lock(&format!("apt-{}", suite.name()))?;
        let folder = cache.folder(&format!("apt-{}", suite.name()))?;
        for part in ["lists/partial", "cache/archives/partial"] {
            let path = folder.join(part);
            fs::create_dir_all(&path).map_err(Error::io("create", &path))?;
        }
        let sources = folder.join("sources.list");
        let lines = suite.base().into_iter().chain([suite]).map(|suite| mirror.source_line(suite) + "\n");
        fs::write(&sources, lines.collect::<String>()).map_err(Error::io("write", &sources))?;
        let config = folder.join("apt.conf");
        fs::write(&config, configuration(&folder)).map_err(Error::io("write", &config))?;
        let apt = Self { config, suite };
        let stamp = folder.join("updated");
        if !is_younger(&stamp, LISTS_AGE) {
            run(apt.command("apt-get").arg("update"))?;
            fs::write(&stamp, "").map_err(Error::io("write", &stamp))?;
        }
        Ok(apt)
    }

    /// The packages that `package` depends on directly, alternatives left out.
    ///
    /// # Errors
    /// When apt fails or does not know the package.
    pub fn depends(&self, package: &str) -> Result<Vec<String>> {
        let output = run(self.command("apt-cache").args(["show", "--no-all-versions", package]))?;
        Ok(parse_depends(&String::from_utf8_lossy(&output.stdout)))
    }

    /// Downloads exactly `packages` into `folder`; returns the files that are there then.
    ///
    /// # Errors
    /// When apt fails.
    pub fn download(&self, packages: &[&str], folder: &Path) -> Result<Vec<PathBuf>> {
        run(self.command("apt-get").arg("download").args(packages).current_dir(folder))?;
        debs(folder)
    }

    /// Downloads `packages` and everything that they depend on into `folder`, as if nothing were installed; from a release that
    /// adds to another, what it has.
    ///
    /// # Errors
    /// When apt fails.
    pub fn download_closure(&self, packages: &[&str], folder: &Path) -> Result<Vec<PathBuf>> {
        let partial = folder.join("partial");
        fs::create_dir_all(&partial).map_err(Error::io("create", &partial))?;
        run(self
            .command("apt-get")
            .arg("-o")
            .arg(format!("Dir::Cache::archives={}", folder.display()))
            .args(["-t", self.suite.name()])
            .args(["-y", "--no-install-recommends", "--download-only", "install"])
            .args(packages))?;
        debs(folder)
    }

    /// The release that this apt is for.
    #[must_use]
    pub fn suite(&self) -> Suite {
        self.suite
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive").arg("-c").arg(&self.config);
        command
    }
}

/// Unpacks the package file `deb` into `folder`.
///
/// # Errors
/// When `dpkg-deb` fails.
pub fn extract(deb: &Path, folder: &Path) -> Result<()> {
    run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(folder)).map(|_| ())
}

/// Makes sure that each program of `tools` (program, package) is on the machine. What is missing is said, then installed
/// system-wide if the user is root; anybody else is told the command.
///
/// # Errors
/// [`Error::MissingTools`] for a user who may not install, or what apt says.
pub fn ensure_installed(tools: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<&str> = tools
        .iter()
        .filter(|(program, _)| find_in_path(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages = missing.join(" ");
    if !is_root()? {
        return Err(Error::MissingTools { packages });
    }
    eprintln!("installing on this machine with apt-get: {packages}");
    let apt = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    };
    run(apt().arg("update"))?;
    run(apt().args(["install", "-y", "--no-install-recommends"]).args(&missing)).map(|_| ())
}

/// Whether this process runs as root.
///
/// # Errors
/// When `id` cannot be run.
pub fn is_root() -> Result<bool> {
    let uid = run(Command::new("id").arg("-u"))?;
    Ok(uid.stdout.trim_ascii() == b"0")
}

/// The full path of `program`, as a shell would find it, with the administrator's folders searched too.
#[must_use]
pub fn find_in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}

/// One entry of an apt source list.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Source {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    signed_by: Option<String>,
}

/// Every source that apt would read on this machine; files that cannot be read are left out, as apt would complain itself.
fn machine_sources() -> Vec<Source> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(folder) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(folder.flatten().map(|entry| entry.path()));
    }
    files.sort();
    let mut sources = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).unwrap_or_default();
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => sources.extend(parse_list(&text)),
            Some("sources") => sources.extend(parse_deb822(&text)),
            _ => {}
        }
    }
    sources
}

/// Debian's archive among `sources`: the one whose suite is this machine's release or one of Debian's moving names.
fn find_mirror(sources: &[Source], os_release: &str) -> Option<Mirror> {
    let field = |name: &str| {
        let line = os_release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
        Some(line.trim_matches('"').to_owned())
    };
    if field("ID")? != "debian" {
        return None;
    }
    let codename = field("VERSION_CODENAME");
    let names = ["stable", "oldstable", "testing", "unstable", "sid"];
    let source = sources.iter().find(|source| {
        source.components.iter().any(|component| component == "main")
            && source
                .suites
                .iter()
                .any(|suite| Some(suite) == codename.as_ref() || names.contains(&suite.as_str()))
    })?;
    let keyring = source.signed_by.as_deref().filter(|path| path.starts_with('/')).unwrap_or(KEYRING);
    Some(Mirror { uri: source.uris.first()?.clone(), keyring: PathBuf::from(keyring) })
}

/// The one-line format of `sources.list(5)`: `deb [options] uri suite component...`.
fn parse_list(text: &str) -> Vec<Source> {
    text.lines().filter_map(|line| parse_list_line(line.split('#').next()?)).collect()
}

fn parse_list_line(line: &str) -> Option<Source> {
    let rest = line.trim().strip_prefix("deb")?;
    let rest = rest.strip_prefix([' ', '\t'])?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(inner) => inner.split_once(']')?,
        None => ("", rest),
    };
    let signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
    let mut words = rest.split_whitespace().map(str::to_owned);
    let (uri, suite) = (words.next()?, words.next()?);
    Some(Source {
        uris: vec![uri],
        suites: vec![suite],
        components: words.collect(),
        signed_by: signed_by.map(str::to_owned),
    })
}

/// The deb822 format of `sources.list(5)`: stanzas of `Field: values`, continued on indented lines.
fn parse_deb822(text: &str) -> Vec<Source> {
    let uncommented: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    uncommented.split(|line| line.trim().is_empty()).filter_map(parse_stanza).collect()
}

fn parse_stanza(lines: &[&str]) -> Option<Source> {
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in lines {
        if line.starts_with([' ', '\t']) {
            let (_, value) = fields.last_mut()?;
            value.push(' ');
            value.push_str(line.trim());
        } else {
            let (name, value) = line.split_once(':')?;
            fields.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    let words = |name: &str| -> Vec<String> {
        let value = fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str());
        value.unwrap_or_default().split_whitespace().map(str::to_owned).collect()
    };
    let disabled = words("enabled").iter().any(|word| word.eq_ignore_ascii_case("no"));
    if disabled || !words("types").iter().any(|kind| kind == "deb") {
        return None;
    }
    Some(Source {
        uris: words("uris"),
        suites: words("suites"),
        components: words("components"),
        signed_by: words("signed-by").into_iter().next(),
    })
}

/// The archive that the shell script debootstrap takes when it is told none.
fn parse_debootstrap(script: &str) -> Option<String> {
    let value = script.lines().find_map(|line| line.trim().strip_prefix("DEF_MIRROR="))?;
    Some(value.trim_matches('"').to_owned())
}

/// Package names of the `Depends` field of `apt-cache show`.
fn parse_depends(text: &str) -> Vec<String> {
    let line = text.lines().find_map(|line| line.strip_prefix("Depends:")).unwrap_or_default();
    line.split(',').filter_map(|word| word.split_whitespace().next()).map(str::to_owned).collect()
}

fn configuration(folder: &Path) -> String {
    let folder = folder.display();
    // `-` for sourceparts: none. The hooks act on the machine's own folders, so they go. apt's lock is beside the status file,
    // which only root may write; the cache has its own.
    format!(
        "#clear APT::Update;\n#clear DPkg::Post-Invoke;\n#clear Acquire::IndexTargets::deb::DEP-11;\n\
         APT::Architecture \"amd64\";\nAPT::Sandbox::User \"root\";\nDebug::NoLocking \"1\";\nAcquire::Languages \"none\";\n\
         Dir::Etc::sourcelist \"{folder}/sources.list\";\nDir::Etc::sourceparts \"-\";\n\
         Dir::State::lists \"{folder}/lists\";\nDir::State::status \"/dev/null\";\nDir::Cache \"{folder}/cache\";\n"
    )
}

fn debs(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(Error::io("read", folder))?;
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "deb"))
        .collect();
    files.sort();
    Ok(files)
}

fn is_younger(path: &Path, limit: Duration) -> bool {
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified());
    modified.is_ok_and(|time| time.elapsed().is_ok_and(|age| age < limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOKWORM: &str = "ID=debian\nVERSION_CODENAME=bookworm\n";

    #[test]
    fn one_line_sources_are_read() {
        let text = "# comment\ndeb-src http://a/debian bookworm main\ndeb http://tools/apt tools-bookworm main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://a/debian bookworm main contrib # more\ndeb\ndeb [x http://b c\n";
        let sources = parse_list(text);
        assert_eq!(sources.len(), 2);
        let mirror = find_mirror(&sources, BOOKWORM).unwrap();
        assert_eq!(mirror, Mirror { uri: "http://a/debian".into(), keyring: "/k.gpg".into() });
    }

    #[test]
    fn deb822_sources_are_read() {
        let text = "Types: deb\nURIs: http://tools/apt\nSuites: nodistro\nComponents: main\n\n\
                    Enabled: no\nTypes: deb\nURIs: http://off/debian\nSuites: bookworm\nComponents: main\n\n\
                    # a comment\nTypes: deb deb-src\nURIs: http://a/debian\n http://b/debian\nSuites: bookworm bookworm-updates\n\
                    Components: main\nSigned-By:\n -----BEGIN PGP\n";
        let sources = parse_deb822(text);
        assert_eq!(sources.len(), 2);
        assert_eq!(sources[1].uris, ["http://a/debian", "http://b/debian"]);
        let mirror = find_mirror(&sources, BOOKWORM).unwrap();
        assert_eq!(mirror, Mirror { uri: "http://a/debian".into(), keyring: KEYRING.into() });
    }

    #[test]
    fn security_updates_and_other_systems_are_no_mirror() {
        let security = parse_list("deb http://a/security bookworm-security main\n");
        assert_eq!(find_mirror(&security, BOOKWORM), None);
        let ubuntu = parse_list("deb http://u/ubuntu noble main\n");
        assert_eq!(find_mirror(&ubuntu, "ID=ubuntu\nVERSION_CODENAME=noble\n"), None);
        let moving = parse_list("deb http://a/debian testing main\n");
        assert!(find_mirror(&moving, "ID=debian\n").is_some());
    }

    #[test]
    fn broken_sources_are_left_out() {
        for text in ["", " continued\n", "no colon\n", "Types: deb-src\nURIs: x\n", ":\n:\n"] {
            assert!(parse_deb822(text).is_empty(), "{text:?}");
        }
        assert_eq!(
            find_mirror(&parse_deb822("Types: deb\nSuites: bookworm\nComponents: main"), BOOKWORM),
            None
        );
    }

    #[test]
    fn debootstraps_archive_is_read() {
        let script = "#!/bin/sh\nUSE=1\n  DEF_MIRROR=\"http://a/debian\"\n";
        assert_eq!(parse_debootstrap(script).as_deref(), Some("http://a/debian"));
        assert_eq!(parse_debootstrap("exit\n"), None);
    }

    #[test]
    fn the_source_line_names_suite_and_keys() {
        let mirror = Mirror { uri: "http://a/debian".into(), keyring: "/k.gpg".into() };
        assert_eq!(mirror.source_line(Suite::Trixie), "deb [signed-by=/k.gpg] http://a/debian trixie main");
    }

    #[test]
    fn depends_are_read() {
        let text = "Package: meta\nDepends: linux-image-6.1.0-50-cloud-amd64 (= 6.1.176-1), b | c\n";
        assert_eq!(parse_depends(text), ["linux-image-6.1.0-50-cloud-amd64", "b"]);
        assert!(parse_depends("Package: x\n").is_empty());
    }
}
