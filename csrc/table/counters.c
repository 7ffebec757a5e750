/* Making and mapping the counter slots: see counters.h. */
#include "table/counters.h"

#include <string.h>

#include "table/memfd.h"

static const char MAGIC[8] = {'F', 'C', 'A', 'S', 'C', 'T', 'R', '1'};
#define VERSION   1u
#define SLOTS_AT  4096u
#define SLOTS_MAX 4096u

typedef struct {
    char     magic[8];
    uint32_t version;
    uint32_t n_slots;
} counters_header;

static size_t counters_bytes(uint32_t n_slots)
{
    return SLOTS_AT + (size_t)n_slots * FCAS_CTR_SLOT_SIZE;
}

fcas_status fcas_counters_create(int fd, uint32_t n_slots)
{
    if (n_slots < 1 || n_slots > SLOTS_MAX)
        return FCAS_E_ARG;
    fcas_status st = fcas_memfd_size(fd, counters_bytes(n_slots));
    if (st != FCAS_OK)
        return st;
    counters_header *h = mmap(NULL, SLOTS_AT, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (h == MAP_FAILED)
        return FCAS_E_SYS;
    memcpy(h->magic, MAGIC, sizeof(MAGIC));
    h->version = VERSION;
    h->n_slots = n_slots;
    munmap(h, SLOTS_AT);
    return fcas_memfd_seal(fd, 0);
}

fcas_status fcas_counters_map(int fd, fcas_counter_slot **slots, uint32_t *n_slots)
{
    uint8_t *base;
    size_t size;
    fcas_status st = fcas_memfd_map(fd, PROT_READ | PROT_WRITE, SLOTS_AT, &base, &size);
    if (st != FCAS_OK)
        return st;
    counters_header h;
    memcpy(&h, base, sizeof(h));
    if (memcmp(h.magic, MAGIC, sizeof(MAGIC)) != 0)
        st = FCAS_E_CORRUPT;
    else if (h.version != VERSION)
        st = FCAS_E_VERSION;
    else if (h.n_slots < 1 || h.n_slots > SLOTS_MAX || counters_bytes(h.n_slots) != size)
        st = FCAS_E_CORRUPT;
    if (st != FCAS_OK) {
        munmap(base, size);
        return st;
    }
    *slots = (fcas_counter_slot *)(void *)(base + SLOTS_AT);
    *n_slots = h.n_slots;
    return FCAS_OK;
}

void fcas_counters_unmap(fcas_counter_slot *slots, uint32_t n_slots)
{
    if (slots != NULL)
        munmap((uint8_t *)slots - SLOTS_AT, counters_bytes(n_slots));
}
