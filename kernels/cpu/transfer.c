/* KV rows of tokens from the blocks of one pool to those of another (kernels/transfer.py).
 *
 * What the bytes of a block mean stands in kernels/kv_format.py. Threads call this beside the one that computes, so it keeps
 * away from the team and from scratch memory: all that it has is on its own stack.
 */
#include "kv_format.h"
#include "team.h"

typedef struct {
    char *pool;
    const int32_t *table;
    int64_t offset, blocks, dtype, heads, block_tokens;
} Side;

/* VL elements as float32; and back. inverse: what a quantized row's numbers are multiplied by. */
INLINE vf widen(const char *p, float scale, int dtype) {
    if (!quantized(dtype)) return vf_load_as(p, dtype);
    if (dtype == INT8) return vf_widen8((const int8_t *)p) * scale;
    return e4m3_widen(read_bytes(p)) * scale;
}

INLINE void narrow(char *p, vf x, float inverse, int dtype) {
    if (!quantized(dtype)) {
        vf_write(p, 0, VL, dtype, x);
        return;
    }
    vf scaled = x * inverse;
    /* 1.5 * 2^23: adding it rounds to an integer in the low bits, which are 0 for a NaN */
    write_bytes(p, dtype == FP8 ? e4m3_round(scaled) : (vu)(scaled + vf_set1(12582912.0f)));
}

/* The last elements of a row, fewer than VL, as so many with zeros behind. */
INLINE vf widen_last(const char *p, int64_t n, float scale, int dtype) {
    char whole[VL * 4] = {0};
    memcpy(whole, p, (size_t)(n * element_bytes(dtype)));
    return widen(whole, scale, dtype);
}

INLINE void convert_row(
    const char *from, const char *from_scale, char *to, char *to_scale, int64_t head_dim, int from_dtype, int to_dtype
) {
    int64_t from_bytes = element_bytes(from_dtype), to_bytes = element_bytes(to_dtype), whole = head_dim / VL * VL;
    float scale = 1.0f, inverse = 1.0f;
    if (quantized(from_dtype)) memcpy(&scale, from_scale, sizeof scale);
    if (quantized(to_dtype)) {
        /* the bits of numbers without a sign are in the order of the numbers, NaNs above all */
        vu highest = {0};
        for (int64_t i = 0; i < whole; i += VL)
            highest = vu_max(highest, (vu)widen(from + i * from_bytes, scale, from_dtype) & 0x7fffffffu);
        if (whole < head_dim)
            highest = vu_max(
                highest, (vu)widen_last(from + whole * from_bytes, head_dim - whole, scale, from_dtype) & 0x7fffffffu
            );
        uint32_t bits = vu_highest(highest);
        float most, greatest = to_dtype == INT8 ? 127.0f : 448.0f;
        memcpy(&most, &bits, sizeof most);
        if (most < 0x1p-100f) most = 0.0f;
        inverse = most > 0.0f ? 1.0f / most * greatest : 0.0f; /* two roundings, as torch divides a number by a tensor */
        most /= greatest;
        memcpy(to_scale, &most, sizeof most);
    }
    for (int64_t i = 0; i < whole; i += VL)
        narrow(to + i * to_bytes, widen(from + i * from_bytes, scale, from_dtype), inverse, to_dtype);
    if (whole < head_dim) {
        char last[VL * 4];
        narrow(last, widen_last(from + whole * from_bytes, head_dim - whole, scale, from_dtype), inverse, to_dtype);
        memcpy(to + whole * to_bytes, last, (size_t)((head_dim - whole) * to_bytes));
    }
}

typedef struct {
    const char *from, *from_scales;
    char *to, *to_scales;
    int64_t rows, head_dim;
} Rows; /* of one plane, next to each other in both pools */

INLINE void convert_rows(const Rows *job, int from_dtype, int to_dtype) {
    int64_t from_bytes = job->head_dim * element_bytes(from_dtype), to_bytes = job->head_dim * element_bytes(to_dtype);
    for (int64_t row = 0; row < job->rows; row++)
        convert_row(
            job->from + row * from_bytes, job->from_scales + row * 4, job->to + row * to_bytes, job->to_scales + row * 4,
            job->head_dim, from_dtype, to_dtype
        );
}

INLINE void convert_to(const Rows *job, int64_t from_dtype, int to_dtype) {
    if (from_dtype == FLOAT32) convert_rows(job, FLOAT32, to_dtype);
    else if (from_dtype == BFLOAT16) convert_rows(job, BFLOAT16, to_dtype);
    else if (from_dtype == FLOAT16) convert_rows(job, FLOAT16, to_dtype);
    else if (from_dtype == INT8) convert_rows(job, INT8, to_dtype);
    else convert_rows(job, FP8, to_dtype);
}

static void move_rows(const Rows *job, int64_t from_dtype, int64_t to_dtype) {
    if (from_dtype == to_dtype) {
        memcpy(job->to, job->from, (size_t)(job->rows * job->head_dim * element_bytes(to_dtype)));
        if (quantized(to_dtype)) memcpy(job->to_scales, job->from_scales, (size_t)(job->rows * 4));
    } else if (to_dtype == FLOAT32) convert_to(job, from_dtype, FLOAT32);
    else if (to_dtype == BFLOAT16) convert_to(job, from_dtype, BFLOAT16);
    else if (to_dtype == FLOAT16) convert_to(job, from_dtype, FLOAT16);
    else if (to_dtype == INT8) convert_to(job, from_dtype, INT8);
    else convert_to(job, from_dtype, FP8);
}

static Side side_of(const Arg *a) {
    return (Side){a[0].p, a[1].p, a[2].i, a[3].i, a[4].i, a[5].i, a[6].i};
}

/* 1 + the first index of the table that holds one of the tokens and names no block of the pool, or 0. */
static int64_t wrong_block(const Side *side, int64_t num_tokens) {
    int64_t end = (side->offset + num_tokens + side->block_tokens - 1) / side->block_tokens;
    for (int64_t i = side->offset / side->block_tokens; num_tokens && i < end; i++)
        if (side->table[i] < 0 || side->table[i] >= side->blocks) return i + 1;
    return 0;
}

/* For the source, then for the target: pool, table, offset, blocks of the pool, dtype, heads, tokens of a block; number of
 * tokens, layers, head_dim; the source's first head, the target's, number of heads. Returns 0 or, with nothing written, 1 +
 * the first index of the source's table whose block is out of range, or the negative of that for the target's. */
int64_t tandem_transfer_tokens(const Arg *a) {
    Side source = side_of(a), target = side_of(a + 7);
    int64_t num_tokens = a[14].i, halves = 2 * a[15].i, head_dim = a[16].i;
    int64_t source_head = a[17].i, target_head = a[18].i, heads = a[19].i;
    int64_t wrong = wrong_block(&source, num_tokens);
    if (!wrong) wrong = -wrong_block(&target, num_tokens);
    if (wrong) return wrong;

    int64_t from_bytes = head_dim * element_bytes(source.dtype), to_bytes = head_dim * element_bytes(target.dtype);
    int64_t from_plane = source.block_tokens * (from_bytes + 4 * quantized(source.dtype));
    int64_t to_plane = target.block_tokens * (to_bytes + 4 * quantized(target.dtype));
    int whole_planes = source.dtype == target.dtype && from_plane == to_plane;
    for (int64_t done = 0, run; done < num_tokens; done += run) {
        int64_t from_row = source.offset + done, from_slot = from_row % source.block_tokens;
        int64_t to_row = target.offset + done, to_slot = to_row % target.block_tokens;
        run = num_tokens - done;
        if (run > source.block_tokens - from_slot) run = source.block_tokens - from_slot;
        if (run > target.block_tokens - to_slot) run = target.block_tokens - to_slot;
        const char *from = source.pool + source.table[from_row / source.block_tokens] * halves * source.heads * from_plane;
        char *to = target.pool + target.table[to_row / target.block_tokens] * halves * target.heads * to_plane;
        from += source_head * from_plane;
        to += target_head * to_plane;
        for (int64_t half = 0; half < halves; half++, from += source.heads * from_plane, to += target.heads * to_plane) {
            if (whole_planes && run == target.block_tokens) {
                memcpy(to, from, (size_t)(heads * to_plane));
                continue;
            }
            for (int64_t head = 0; head < heads; head++) {
                const char *plane = from + head * from_plane;
                char *to_head = to + head * to_plane;
                Rows rows = {
                    plane + from_slot * from_bytes, plane + source.block_tokens * from_bytes + from_slot * 4,
                    to_head + to_slot * to_bytes, to_head + target.block_tokens * to_bytes + to_slot * 4,
                    run, head_dim,
                };
                move_rows(&rows, source.dtype, target.dtype);
            }
        }
    }
    return 0;
}
