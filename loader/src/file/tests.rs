use super::*;

#[test]
fn what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("bundle");
    let dead = directory.path().join(".bundle.tmp-1-0");
    fs::create_dir(&dead).unwrap();
    fs::write(dead.join("weights"), "half").unwrap();
    let other = directory.path().join(".other.tmp-1-0");
    fs::create_dir(&other).unwrap();
    let living = NewDirectory::create(&target).unwrap();
    assert!(!dead.exists() && other.exists());
    fs::write(living.path().join("weights"), "whole").unwrap();
    let second = NewDirectory::create(&target).unwrap();
    assert!(living.path().join("weights").exists());
    living.publish(&target).unwrap();
    let error = second.publish(&target).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::DirectoryNotEmpty);
    assert_eq!(fs::read(target.join("weights")).unwrap(), b"whole");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2, "bundle and .other");
}

#[test]
fn a_file_is_replaced_whole_or_stays() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("key");
    fs::write(directory.path().join(".key.tmp-1-0"), "of a killed process").unwrap();
    replace(&target, b"first", true).unwrap();
    let mut half = NewFile::create(&target, true).unwrap();
    half.write_all(b"sec").unwrap();
    drop(half);
    assert_eq!(fs::read(&target).unwrap(), b"first");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    #[cfg(unix)]
    {
        let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(&target).unwrap());
        assert_eq!(mode & 0o777, 0o600);
    }
    // No place: an error, and nothing is left.
    fs::create_dir(directory.path().join("full")).unwrap();
    fs::write(directory.path().join("full/x"), "").unwrap();
    replace(&directory.path().join("full"), b"x", false).unwrap_err();
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
}

#[test]
fn too_long_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("text");
    fs::write(&path, "12345").unwrap();
    assert_eq!(read_text(&path, 5).unwrap(), "12345");
    assert_eq!(read(&path, 4).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    fs::write(&path, [0xff]).unwrap();
    assert_eq!(read_text(&path, 5).unwrap_err().kind(), io::ErrorKind::InvalidData);
}
