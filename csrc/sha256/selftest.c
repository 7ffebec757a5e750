/* Known answers through each function of a kernel: asked before a process trusts it. */
#include <string.h>

#include "sha256/kernels.h"

/* FIPS 180-4's examples of one and of two blocks. */
static const struct {
    const char *text;
    uint8_t digest[FCAS_SHA256_DIGEST];
} known[] = {
    {"abc",
     {0xba, 0x78, 0x16, 0xbf, 0x8f, 0x01, 0xcf, 0xea, 0x41, 0x41, 0x40, 0xde,
      0x5d, 0xae, 0x22, 0x23, 0xb0, 0x03, 0x61, 0xa3, 0x96, 0x17, 0x7a, 0x9c,
      0xb4, 0x10, 0xff, 0x61, 0xf2, 0x00, 0x15, 0xad}},
    {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
     {0x24, 0x8d, 0x6a, 0x61, 0xd2, 0x06, 0x38, 0xb8, 0xe5, 0xc0, 0x26, 0x93,
      0x0c, 0x3e, 0x60, 0x39, 0xa3, 0x3c, 0xe4, 0x59, 0x64, 0xff, 0x21, 0x67,
      0xf6, 0xec, 0xed, 0xd4, 0x19, 0xdb, 0x06, 0xc1}},
};

enum { LONG_SIZE = 1000 };

/* Of the bytes 0, 7, 14, ... modulo 251. */
static const uint8_t long_digest[FCAS_SHA256_DIGEST] = {
    0x59, 0x42, 0x5e, 0x44, 0x12, 0xe2, 0x96, 0xfc, 0x74, 0x73, 0x66, 0x73,
    0xce, 0x06, 0x70, 0x27, 0xf3, 0x84, 0x20, 0x3f, 0x59, 0xc0, 0xd2, 0xc3,
    0xe6, 0xbe, 0x7b, 0x13, 0x34, 0x7b, 0x3f, 0xfc,
};

/* More messages than any kernel has lanes, so that lanes take a second one; each lane gets each kind. */
enum { N_KINDS = 3, N_MESSAGES = N_KINDS * FCAS_SHA256_LANES_MAX };

static int many_is_right(const fcas_sha256_kernel *kernel, const uint8_t message[LONG_SIZE])
{
    const uint8_t *const texts[N_KINDS] = {(const uint8_t *)known[0].text, message,
                                           (const uint8_t *)known[1].text};
    const size_t sizes[N_KINDS] = {strlen(known[0].text), LONG_SIZE, strlen(known[1].text)};
    const uint8_t *const right[N_KINDS] = {known[0].digest, long_digest, known[1].digest};
    const uint8_t *messages[N_MESSAGES];
    size_t lengths[N_MESSAGES];
    uint8_t digests[N_MESSAGES * FCAS_SHA256_DIGEST];

    for (unsigned shift = 0; shift < N_KINDS; shift++) {
        for (unsigned i = 0; i < N_MESSAGES; i++) {
            messages[i] = texts[(i + shift) % N_KINDS];
            lengths[i] = sizes[(i + shift) % N_KINDS];
        }
        fcas_sha256_many(kernel, messages, lengths, N_MESSAGES, digests);
        for (unsigned i = 0; i < N_MESSAGES; i++)
            if (memcmp(digests + FCAS_SHA256_DIGEST * i, right[(i + shift) % N_KINDS], FCAS_SHA256_DIGEST) != 0)
                return 0;
    }
    return 1;
}

static int one_and_two_are_right(const fcas_sha256_kernel *kernel, const uint8_t message[LONG_SIZE])
{
    uint8_t digests[3][FCAS_SHA256_DIGEST];
    fcas_sha256 a, b;

    fcas_sha256_init(&a, kernel);
    fcas_sha256_init(&b, kernel);
    fcas_sha256_update2(&a, &b, message, LONG_SIZE); /* compress2 on the same bytes */
    fcas_sha256_final(&a, digests[0]);
    fcas_sha256_final(&b, digests[1]);
    fcas_sha256_init(&a, kernel);
    fcas_sha256_update(&a, message, LONG_SIZE); /* compress */
    fcas_sha256_final(&a, digests[2]);
    for (unsigned i = 0; i < 3; i++)
        if (memcmp(digests[i], long_digest, FCAS_SHA256_DIGEST) != 0)
            return 0;
    return 1;
}

/* compress2 on different bytes: many() of a kernel with lanes may not need it. */
static int pair_is_right(const fcas_sha256_kernel *kernel)
{
    const size_t n = strlen(known[0].text), m = strlen(known[1].text);
    uint8_t long_tail[2 * FCAS_SHA256_BLOCK], tail[2 * FCAS_SHA256_BLOCK], digests[2][FCAS_SHA256_DIGEST];
    uint32_t states[2][8];

    memcpy(states[0], fcas_sha256_iv, sizeof states[0]);
    memcpy(states[1], fcas_sha256_iv, sizeof states[1]);
    (void)fcas_sha256_pad(tail, (const uint8_t *)known[0].text, n, n);           /* one block */
    (void)fcas_sha256_pad(long_tail, (const uint8_t *)known[1].text, m, m);      /* two */
    kernel->compress2(states[0], tail, states[1], long_tail, 1);
    kernel->compress(states[1], long_tail + FCAS_SHA256_BLOCK, 1);
    fcas_sha256_store_words(digests[0], states[0]);
    fcas_sha256_store_words(digests[1], states[1]);
    return memcmp(digests[0], known[0].digest, FCAS_SHA256_DIGEST) == 0
           && memcmp(digests[1], known[1].digest, FCAS_SHA256_DIGEST) == 0;
}

/* compress_beside, a block of each lane at a time: "abc" in every second lane from the given one on, which ends
 * with the first block, the example of two blocks in the others, and the 16 blocks of the long message beside. */
static int beside_is_right(const fcas_sha256_kernel *kernel, const uint8_t message[LONG_SIZE], unsigned first_abc,
                           int is_alone)
{
    enum { LANES = 2 * FCAS_SHA256_PACE, LONG_BLOCKS = 16 };
    const size_t n = strlen(known[0].text), m = strlen(known[1].text);
    const size_t pace = is_alone ? LANES : FCAS_SHA256_PACE;
    uint8_t padded[(LONG_BLOCKS + 1) * FCAS_SHA256_BLOCK]; /* fcas_sha256_pad asks for room for two blocks */
    uint8_t tails[2][2 * FCAS_SHA256_BLOCK], digest[FCAS_SHA256_DIGEST];
    uint32_t own[LANES][8], fast[2][8];
    uint32_t(*states[LANES])[8];
    const uint8_t *blocks[LANES];
    const size_t whole = LONG_SIZE - LONG_SIZE % FCAS_SHA256_BLOCK;
    int is_right = 1;

    memcpy(padded, message, whole);
    (void)fcas_sha256_pad(padded + whole, message + whole, LONG_SIZE - whole, LONG_SIZE);
    (void)fcas_sha256_pad(tails[0], (const uint8_t *)known[0].text, n, n);
    (void)fcas_sha256_pad(tails[1], (const uint8_t *)known[1].text, m, m);
    for (unsigned l = 0; l < LANES; l++) {
        memcpy(own[l], fcas_sha256_iv, sizeof own[l]);
        states[l] = &own[l];
        blocks[l] = tails[(l + first_abc) % 2];
    }
    memcpy(fast[0], fcas_sha256_iv, sizeof fast[0]);
    memcpy(fast[1], fcas_sha256_iv, sizeof fast[1]);
    for (size_t done = 0; done < LONG_BLOCKS; done += pace) {
        const uint8_t *p = padded + done * FCAS_SHA256_BLOCK;
        kernel->compress_beside(states, blocks, 1, fast[0], p, is_alone ? NULL : fast[1], p);
        for (unsigned l = 0; l < LANES; l++) {
            const unsigned kind = (l + first_abc) % 2; /* ends with that block */
            fcas_sha256_store_words(digest, own[l]);
            if (done == kind * pace)
                is_right &= memcmp(digest, known[kind].digest, sizeof digest) == 0;
            blocks[l] = tails[1] + FCAS_SHA256_BLOCK; /* from the second on for whoever needs it */
        }
    }
    for (unsigned i = 0; i < (is_alone ? 1u : 2u); i++) {
        fcas_sha256_store_words(digest, fast[i]);
        is_right &= memcmp(digest, long_digest, sizeof digest) == 0;
    }
    return is_right;
}

static int all_beside_is_right(const fcas_sha256_kernel *kernel, const uint8_t message[LONG_SIZE])
{
    int is_right = 1;

    if (kernel->compress_beside != NULL)
        for (unsigned i = 0; i < 4; i++)
            is_right &= beside_is_right(kernel, message, i / 2, i % 2 == 0);
    return is_right;
}

fcas_status fcas_sha256_self_test(const fcas_sha256_kernel *kernel)
{
    uint8_t message[LONG_SIZE];

    for (unsigned i = 0; i < LONG_SIZE; i++)
        message[i] = (uint8_t)(7 * i % 251);
    return many_is_right(kernel, message) && one_and_two_are_right(kernel, message) && pair_is_right(kernel)
                   && all_beside_is_right(kernel, message)
               ? FCAS_OK
               : FCAS_E_CORRUPT;
}
