/* Which table epoch is safe: extents in flight are counted in two buckets, the current one and the one before it.
 *
 * A bucket's label is a table epoch that was read before the first lookup counted in it, so no extent in the bucket
 * stems from an earlier lookup. When the table's epoch has advanced and the older bucket is empty, the current one
 * becomes the older one. While it is not empty, new extents go on under the current label: that is later than
 * needed, never too early. O(1) per extent, whatever happens. */
#include "engine/internal.h"

void fcas_epoch_enter(fcas_engine *e, fcas_conn *c)
{
    c->bucket = (uint8_t)(e->current + 1);
    e->count[e->current]++;
}

void fcas_epoch_leave(fcas_engine *e, fcas_conn *c)
{
    if (c->bucket == 0)
        return;
    e->count[c->bucket - 1]--;
    c->bucket = 0;
}

void fcas_epoch_refresh(fcas_engine *e)
{
    if (!e->has_table)
        return;
    uint64_t epoch = fcas_table_epoch(&e->table);
    int      older = !e->current;
    if (epoch > e->label[e->current] && e->count[older] == 0) {
        if (e->count[e->current] != 0)
            e->current = older;
        e->label[e->current] = epoch;
        older = !e->current;
    }
    uint64_t safe = e->count[older] ? e->label[older] : e->label[e->current];
    if (safe != e->safe) {
        e->safe = safe;
        if (e->config.counters)
            fcas_gauge(e->config.counters, FCAS_CTR_EPOCH_SAFE, safe);
    }
}

void fcas_epoch_restart(fcas_engine *e)
{
    e->label[0] = e->label[1] = 0;
    e->safe = 0;
    if (e->config.counters) {
        /* 0 first: whoever sees the new number must not see the old table's epoch with it */
        fcas_gauge(e->config.counters, FCAS_CTR_EPOCH_SAFE, 0);
        fcas_gauge(e->config.counters, FCAS_CTR_EPOCH_TABLE, e->table_number);
    }
    fcas_epoch_refresh(e);
}
