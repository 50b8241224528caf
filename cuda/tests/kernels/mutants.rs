//! Kernels with one mistake each, as a person makes it. What the tests don't notice here they
//! don't notice elsewhere either.

/// A mistake.
pub struct Mutant {
    /// The file.
    pub file: &'static str,
    /// What stands there, once.
    pub from: &'static str,
    /// What stands there instead.
    pub to: &'static str,
    /// In words.
    pub what: &'static str,
    /// Tests that may notice it; fewer take less time.
    pub tests: &'static [&'static str],
    /// How the names of the kernels begin whose launches may be unclean.
    pub launches: &'static str,
    /// Whether it is known to live; docs/KERNELS.md says why.
    pub lives: bool,
}

const fn dies(
    file: &'static str,
    tests: &'static [&'static str],
    what: &'static str,
    from: &'static str,
    to: &'static str,
) -> Mutant {
    Mutant { file, from, to, what, tests, launches: "", lives: false }
}

const ATTENTION: &[&str] = &["attention"];
const ATTEND: &str = "attend.cuh";

#[rustfmt::skip] // a table
pub const MUTANTS: &[Mutant] = &[
    dies("rms_norm.cu", &["norm"], "eps left out", " + p.eps", " + 0.0f * p.eps"),
    dies("rms_norm.cu", &["norm"], "the sum not written back", "      x[i] = v;\n", ""),
    dies("rms_norm.cu", &["norm"], "every row the first", "(size_t)blockIdx.x", "(size_t)0"),
    dies("dev.cuh", &["norm"], "block_sum without its barrier", "partial[threadIdx.x / WARP] = x;\n  __syncthreads();", "partial[threadIdx.x / WARP] = x;"),
    dies("dev.cuh", &["norm", "rows"], "warp_sum a step short", "lane > 0; lane /= 2) x +=", "lane > 1; lane /= 2) x +="),
    dies("panel.cuh", &["rows", "gemv"], "the minimum read at the scale", "block + 4 * 64 + 32 + column", "block + 4 * 64 + column"),
    dies("panel.cuh", &["rows", "gemv"], "columns 8 to 15 read as 0 to 7", "+ column / 8) * 32", ") * 32"),
    dies("panel.cuh", &["rows"], "q4_0 less 7", "(float)(q - 8)", "(float)(q - 7)"),
    dies("embed.cu", &["rows"], "panels of 8 rows", "(size_t)(token / HAT_PANEL) * (p.columns", "(size_t)(token / 8) * (p.columns"),
    dies("silu_mul.cu", &["rows"], "the sign of the exponent", "expf(-gate)", "expf(gate)"),
    dies("silu_mul.cu", &["rows"], "a block too many", "if (quad >= p.count / 4) return;", "if (quad >= p.count) return;"),
    dies("quantise_rows.cu", &["rows"], "tiny blocks not zero", "largest < 1e-30f", "largest < 1e-38f"),
    dies("quantise_rows.cu", &["rows"], "f16 cut a step early", "#define HALF_MAX 65504.0f", "#define HALF_MAX 65472.0f"),
    dies("quantise_rows.cu", &["rows"], "two sums without a barrier between", "partial);\n  __syncthreads();\n", "partial);\n"),
    dies("rope_append.cu", &["attention::rope"], "the sign of a sine", "head[0] = fmaf(x, c, -(y * s))", "head[0] = fmaf(x, c, y * s)"),
    dies("rope_append.cu", &["attention::rope"], "v to k's place in the page", "(size_t)page * p.kv_heads + head) * HAT_PAGE_SIZE + at)", "(size_t)page * p.kv_heads + head) * HAT_PAGE_SIZE + at / 2)"),
    dies("compact.cu", &["attention::compact"], "from and to swapped", "*chunk(p.moves[2 * m + 1]) = *chunk(p.moves[2 * m])", "*chunk(p.moves[2 * m]) = *chunk(p.moves[2 * m + 1])"),
    dies("compact.cu", &["attention::compact"], "one layer alone", " + blockIdx.y * p.layer_numbers", " + 0 * p.layer_numbers"),
    dies("compact.cu", &["attention::compact"], "the last move left out", "m < p.indptr[blockIdx.z + 1]", "m + 1 < p.indptr[blockIdx.z + 1]"),
    dies("top_k.cu", &["choice"], "ties to the higher column", "a.column < b.column", "a.column > b.column"),
    dies("top_k.cu", &["choice"], "the same number taken again", " && is_before(last, candidate)", ""),
    dies("top_k.cu", &["choice"], "no barrier between passes", "  __syncthreads(); // the last pass has read `partial`\n", ""),
    dies("top_k.cu", &["choice"], "columns within the slice", "Top{slice[i], first + i}", "Top{slice[i], i}"),
    dies("accept_tree.cu", &["choice"], "the root its own child", "node > 0 && node < nodes", "node < nodes"),
    dies("accept_tree.cu", &["choice"], "the later sibling", "at = low ?", "at = !high ?"),
    dies("gemv.cu", &["gemv"], "high nibbles times low activations", "(int)q[j + 4], sum);", "(int)q[j], sum);"),
    dies("gemv.cu", &["gemv"], "the minimum without its sum", "fmaf(minimum, p.s[at], sums[r])", "fmaf(minimum, p.d[at], sums[r])"),
    dies("gemv.cu", &["gemv"], "half of the blocks twice", "b += 2 * GEMV_WARPS", "b += GEMV_WARPS"),
    dies("gemv.cu", &["gemv"], "no barrier before the last sum", "  __syncthreads();\n  const uint32_t row", "  const uint32_t row"),
    dies("gemv.cu", &["gemv"], "outputs beyond the matrix written", " || output >= p.outputs) return", ") return"),
    dies("gemv.cu", &["gemv"], "rows read that are not there", "if (ROWS > 1 && row >= p.rows) break;", ""),
    dies("gemv.cu", &["gemv"], "a sum that depends on ROWS", "partial[threadIdx.x / WARP][r][column] = sums[r] + other;", "partial[threadIdx.x / WARP][r][column] = ROWS > 1 ? sums[r] * 0.5f + (other + sums[r] * 0.5f) : sums[r] + other;"),
    dies(ATTEND, ATTENTION, "causal mask one short", "position <= queries[h].last", "position < queries[h].last"),
    dies(ATTEND, ATTENTION, "the window one short", "last - p.window + 1 : 0", "last - p.window + 2 : 0"),
    dies(ATTEND, ATTENTION, "the tail one late", "position >= prefix) slot", "position > prefix) slot"),
    dies(ATTEND, ATTENTION, "unwritten keys loaded", "const bool real = position < end;", "const bool real = position < end + 1;"),
    dies(ATTEND, ATTENTION, "a tile of another row of the tree used", "step.row < 0 || step.row == queries[h].row", "step.row < 0 || queries[h].row >= 0"),
    dies(ATTEND, ATTENTION, "a copy not waited for", "copy_async_wait<1>();", "copy_async_wait<2>();"),
    dies(ATTEND, ATTENTION, "no barrier before a tile is read", "copy_async_wait<1>();\n      __syncthreads();", "copy_async_wait<1>();"),
    dies(ATTEND, ATTENTION, "no barrier before a tile is overwritten", "      __syncthreads();\n      step = next;", "      step = next;"),
    dies(ATTEND, ATTENTION, "the next tile into the one in use", "tiles[turn ^ 1]", "tiles[turn]"),
    dies(ATTEND, ATTENTION, "old sums not faded", "sums[n][h * 2] *= fade;", ""),
    dies(ATTEND, ATTENTION, "a quad's sum a step short", "      states[h].sum += __shfl_xor_sync(ALL_LANES, states[h].sum, 2);\n", ""),
    dies(ATTEND, ATTENTION, "the largest of a pair alone", "    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));\n", ""),
    dies(ATTEND, ATTENTION, "the scale left out", "score = seen ? score * scale", "score = seen ? score"),
    dies(ATTEND, ATTENTION, "halves of a matrix swapped", "lane % 8 + lane / 16 * 8, column = d * 16 + lane / 8 % 2 * 8", "lane % 8 + lane / 8 % 2 * 8, column = d * 16 + lane / 16 * 8"),
    dies(ATTEND, ATTENTION, "the first key/value head alone", "p.kv_heads + blockIdx.y) * HAT_PAGE_SIZE", "p.kv_heads + 0) * HAT_PAGE_SIZE"),
    dies(ATTEND, ATTENTION, "bank conflicts", "constexpr int TILE_STRIDE = D + 8", "constexpr int TILE_STRIDE = D"),
    dies(ATTEND, ATTENTION, "a split's weight left out of the sum", "before.sum = fmaf(before.sum, fade, split.sum * weight);", "before.sum = fmaf(before.sum, fade, split.sum);"),
    dies(ATTEND, ATTENTION, "the parts' layout", "const size_t part = (size_t)query.query * p.splits + split;", "const size_t part = (size_t)query.query * p.splits + split / 2;"),
    dies(ATTEND, ATTENTION, "splits that begin where the task does", "const uint32_t begin = max(split * HAT_SPLIT_TILES, task.first_tile);", "const uint32_t begin = max(split * HAT_SPLIT_TILES, task.first_tile + split);"),
    dies("attend_verify.cu", ATTENTION, "the merge one split short", "split < p.splits; ++split", "split + 1 < p.splits; ++split"),
    dies("attend_prefill.cu", ATTENTION, "the last split left out", "(p.tasks[blockIdx.x].end + split_keys - 1) / split_keys", "(p.tasks[blockIdx.x].end + split_keys - 2) / split_keys"),
    Mutant {
        file: ATTEND,
        from: "const size_t at = (((size_t)page * p.kv_heads",
        to: "const uint32_t at = (((uint32_t)page * p.kv_heads",
        what: "offsets of pages in 32 bits",
        tests: ATTENTION,
        launches: "attend",
        lives: true,
    },
    Mutant {
        file: ATTEND,
        from: "base = finite_or_zero(largest), fade = exp2_fast(states[h].largest - base);",
        to: "base = finite_or_zero(largest), fade = exp2_fast((states[h].largest - base) * 1.0000001f);",
        what: "a rounding of one unit",
        tests: ATTENTION,
        launches: "attend",
        lives: true,
    },
];
