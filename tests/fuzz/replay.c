/* Stands in for libFuzzer where there is none: gives a target the files of a corpus, then random mutations of them.
 *
 *   replay SEED MILLISECONDS FILE...      a crash names the seed; MILLISECONDS 0 = the files only
 *
 * The last input is in the file named by FUZZ_LAST (environment) before the target sees it. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SIZE_MAX_INPUT 16384u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef struct {
    uint8_t *bytes;
    size_t   n;
} sample;

static uint64_t rng_state;
static int      last_fd = -1;

static uint32_t rnd(uint32_t below)
{
    rng_state ^= rng_state << 13;
    rng_state ^= rng_state >> 7;
    rng_state ^= rng_state << 17;
    return (uint32_t)(rng_state >> 24) % below;
}

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000ll + t.tv_nsec / 1000000;
}

static sample read_sample(const char *path)
{
    sample s = {malloc(SIZE_MAX_INPUT), 0};
    FILE  *f = fopen(path, "rb");
    if (!f || !s.bytes) {
        fprintf(stderr, "replay: cannot read %s\n", path);
        exit(3);
    }
    s.n = fread(s.bytes, 1, SIZE_MAX_INPUT, f);
    fclose(f);
    return s;
}

/* Give an input of exactly its size to the target. */
static void give(const uint8_t *bytes, size_t n)
{
    uint8_t *copy = malloc(n ? n : 1);
    if (!copy)
        exit(3);
    memcpy(copy, bytes, n);
    if (last_fd >= 0 && (pwrite(last_fd, bytes, n, 0) != (ssize_t)n || ftruncate(last_fd, (off_t)n) != 0))
        exit(3);
    LLVMFuzzerTestOneInput(copy, n);
    free(copy);
}

static size_t mutate(uint8_t *out, size_t n, const sample *other)
{
    static const char ODD[] = "\r\n \t:,%?#/0\x7f\xff" "rRtahxcfdD";
    for (uint32_t k = 1 + rnd(4); k > 0; k--) {
        size_t at = rnd((uint32_t)n + 1);
        switch (rnd(5)) {
        case 0:
            if (at < n)
                out[at] = (uint8_t)rnd(256);
            break;
        case 1: { /* take some away */
            size_t gone = at + rnd(8) < n ? rnd(8) : 0;
            if (at + gone <= n) {
                memmove(out + at, out + at + gone, n - at - gone);
                n -= gone;
            }
            break;
        }
        case 2: /* an odd byte more */
            if (n < SIZE_MAX_INPUT) {
                memmove(out + at + 1, out + at, n - at);
                out[at] = (uint8_t)ODD[rnd(sizeof ODD - 1)];
                n++;
            }
            break;
        case 3: { /* a piece of another sample */
            size_t from = rnd((uint32_t)other->n + 1), part = other->n - from;
            part = part > 64 ? 64 : part;
            if (n + part <= SIZE_MAX_INPUT) {
                memmove(out + at + part, out + at, n - at);
                memcpy(out + at, other->bytes + from, part);
                n += part;
            }
            break;
        }
        default: /* end here */
            if (rnd(4) == 0)
                n = at;
        }
    }
    return n;
}

int main(int argc, char **argv)
{
    static uint8_t work[SIZE_MAX_INPUT];
    if (argc < 4)
        return 64;
    rng_state = strtoull(argv[1], NULL, 10) * 0x9e3779b97f4a7c15ull | 1;
    int     n_samples = argc - 3;
    sample *samples = calloc((size_t)n_samples, sizeof *samples);
    if (!samples)
        return 3;
    if (getenv("FUZZ_LAST"))
        last_fd = open(getenv("FUZZ_LAST"), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    for (int i = 0; i < n_samples; i++) {
        samples[i] = read_sample(argv[i + 3]);
        give(samples[i].bytes, samples[i].n);
    }
    int64_t       end = now_ms() + atoll(argv[2]);
    unsigned long runs = 0;
    while (now_ms() < end) {
        const sample *from = &samples[rnd((uint32_t)n_samples)];
        memcpy(work, from->bytes, from->n);
        give(work, mutate(work, from->n, &samples[rnd((uint32_t)n_samples)]));
        runs++;
    }
    printf("samples %d mutations %lu\n", n_samples, runs);
    for (int i = 0; i < n_samples; i++)
        free(samples[i].bytes);
    free(samples);
    return 0;
}
