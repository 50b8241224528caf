//! Entries for fuzzers: any bytes in, no panic out. Tests drive them with mutated valid files.

/// Parses bytes as the header of a safetensors file; whether it is valid.
pub fn fuzz_safetensors_header(bytes: &[u8]) -> bool {
    crate::header::read(bytes).is_ok()
}

/// Parses bytes as a GGUF file and turns its metadata into a configuration and a tokenizer;
/// whether all of it is valid.
pub fn fuzz_gguf(bytes: &[u8]) -> bool {
    crate::gguf::fuzz(bytes)
}
