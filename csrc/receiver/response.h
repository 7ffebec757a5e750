/* The head of an HTTP/1.1 response, parsed strictly: what is not exactly allowed is refused.
 *
 * Pure: no I/O, no allocation. The same bytes give the same answer however they were cut into pieces,
 * because a head that is not complete is simply parsed again when more has arrived (at most 16 KiB). */
#ifndef FCAS_RECEIVER_RESPONSE_H
#define FCAS_RECEIVER_RESPONSE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FCAS_RX_HEAD_MAX 16384u

/* Why a response was refused. The numbers are shown to Python, which has the words for them. */
enum fcas_rx_refusal {
    FCAS_RX_REFUSE_NONE = 0,
    FCAS_RX_REFUSE_STATUS_LINE,       /* not "HTTP/1.1 NNN" */
    FCAS_RX_REFUSE_HEADER_SYNTAX,     /* bare CR or LF, folding, no colon, a control character, a bad name */
    FCAS_RX_REFUSE_HEADERS_TOO_LONG,  /* over FCAS_RX_HEAD_MAX */
    FCAS_RX_REFUSE_INTERIM,           /* 1xx */
    FCAS_RX_REFUSE_REDIRECT,          /* 3xx */
    FCAS_RX_REFUSE_TRANSFER_ENCODING,
    FCAS_RX_REFUSE_CONTENT_ENCODING,
    FCAS_RX_REFUSE_NO_LENGTH,
    FCAS_RX_REFUSE_BAD_LENGTH,        /* not digits, or given twice */
    FCAS_RX_REFUSE_OTHER_LENGTH,      /* not the expected one, or over the limit */
    FCAS_RX_REFUSE_CHUNK_NUMBER,      /* NEXT: no X-Fastcas-Chunk, or one that the file does not have */
    FCAS_RX_REFUSE_UNASKED            /* bytes that no request asked for */
};

typedef struct {
    uint16_t status;     /* 200..599 */
    bool     close;      /* Connection: close */
    bool     has_chunk;  /* X-Fastcas-Chunk */
    uint64_t chunk;
    uint64_t length;     /* of the body; 0 for 204 */
    size_t   n_head;     /* bytes up to and including the empty line */
} fcas_rx_response;

/* Parse the head at p, of which n bytes have arrived.
 *
 * Returns 1 and *out when it is complete, 0 when more bytes are needed, -refusal otherwise. Reads at most
 * FCAS_RX_HEAD_MAX bytes; n beyond that without an end is FCAS_RX_REFUSE_HEADERS_TOO_LONG. */
int fcas_rx_parse_response(const uint8_t *p, size_t n, fcas_rx_response *out);

#endif
