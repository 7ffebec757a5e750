"""Every number of the DHT: sizes, rates, times, caps, with unit and reason. Source: discovery notes §2.4–§2.6."""

from __future__ import annotations

# --- wire ---
WIRE_VERSION = 1
DATAGRAM_MAX = 1200  # bytes both ways: never fragments, IPv6 minimum MTU with room
DATAGRAM_MIN = 22  # type, message id, one byte of msgpack
FLAG_READ_ONLY = 1  # asks only; must not enter tables
AMPLIFICATION_MAX = 3  # reply bytes per request byte to an address that has not shown a token
KEYS_PER_ANNOUNCE = 130  # 8-byte keys in one `ap` datagram
KEYS_PER_QUERY = 96
FILES_PER_ANNOUNCE = 48  # 22-byte items in one `as` datagram
CONTACTS_PER_REPLY = 20
CONTACTS_PER_REPLY_MAX = 40  # when asked for; what fits one datagram
CONTACTS_BESIDE_RECORDS = 8  # room kept for them; more where records leave it
CONTACTS_BESIDE_METADATA = 4
PAD_TO = 400  # bytes of a request without a token, so that three times it holds a full reply

# --- table ---
KSIZE = 20
BUCKETS_MAX = 150
PER_SUBNET_BUCKET = 2  # contacts of one /24 (/64) in a bucket, and in one lookup
PER_SUBNET_TABLE = 10
FAILURES_MAX = 2  # unanswered requests in a row before a contact is given up
CHALLENGES_IN_FLIGHT = 64
CHALLENGE_PAUSE_S = 30.0  # before the same address is challenged again in vain
PROOF_S = 3600.0  # an address belongs to who signed there
PING_STALEST_EVERY_S = 10.0  # with REFRESH_EVERY_S below 0.5 datagrams per second
STALE_AFTER_S = 30.0
REFRESH_FIRST_S = (15.0, 45.0)  # pauses: when many join at the same time, the first ones know few of them
REFRESH_EVERY_S = 600.0
SAVED_CONTACTS_MAX = 400
SAVE_PAUSE_S = 1.0  # after a change worth saving; several go into one write
SAVE_EVERY_S = 300.0  # whatever changed
SAVE_SHARE = 0.05  # of the table that changed is worth saving: nine tenths are to survive a kill
FORMER_ASKED = 40  # saved contacts asked at a time, once all were asked in vain

# --- requests that we send ---
RTO_FIRST_S = 0.35
RTO_MIN_S = 0.1
RTO_MAX_S = 0.6
RPC_HARD_S = 1.0
WRITE_HARD_S = 2.5
OUTSTANDING_MAX = 8192
TIMER_GRAIN_S = 0.001  # what is due within it is due now: event loops count milliseconds

# --- lookups ---
ALPHA = 5
ALPHA_MAX = 10  # after contacts that did not answer
LOOKUP_RPCS_MAX = 120
LOOKUP_S = 10.0
SHORTLIST_MAX = 1000
LIES_MAX = 6  # dead contacts that a node may name, besides three for each that lives

# --- what searches remember ---
REGION_S = 600.0
PROVIDERS_S = 600.0
PROVIDERS_FEW_S = 60.0  # so long a result with fewer peers than wanted is repeated without asking anybody
MISS_FIRST_S = 30.0
MISS_LAST_S = 300.0
CACHED_KEYS_MAX = 200_000
CACHED_REGIONS_MAX = 20_000
PROBES_MAX = 6  # requests to get three answers from the nearest nodes of a known key

# --- sources ---
RATE_UNPROVEN = 20.0  # requests per second of one source
BURST_UNPROVEN = 100.0
RATE_PROVEN = 300.0
BURST_PROVEN = 2000.0
RATE_LOCAL = 20_000.0  # loopback and own prefixes, per (ip, port)
BURST_LOCAL = 40_000.0
SOURCE_BAN_S = 300.0
SOURCES_MAX = 20_000
SIGNATURES_PER_S = 2000.0  # pongs to sources that are not proven, all of them together
TOKEN_ROTATE_S = 300.0

# --- records held for others ---
HINTS_MAX = 1_000_000
PROVIDERS_MAX = 20_000  # announcers of hints; one costs about 500 bytes
PROVIDERS_PER_KEY = 64
PEERS_PER_REPLY = 16
SUBNET_SHARE = 0.10  # of all hints may come from one /24 (/64)
SWARM_RECORDS_MAX = 200_000
PER_SUBNET_SWARM = 8  # providers of one /24 (/64) under one key
METADATA_KEYS_MAX = 20_000
METADATA_PER_KEY = 8
METADATA_VALUE_MAX = 900  # bytes
TTL_MIN_S = 60
SWARM_TTL_S = 2 * 3600
METADATA_TTL_S = 24 * 3600
TTL_MAX_S = 48 * 3600

# --- announcing ---
CHUNK_CYCLE_MIN_S = 3600.0  # of 8 holders that stay an hour (median) one is left then with 99.6 %
CHUNK_TTL_CYCLES = 2.2  # a missed announcement loses nothing
CHUNK_TTL_MIN_S = 2 * 3600
CHUNK_TTL_MAX_S = 48 * 3600
CHUNK_SLICES = 64  # parts of the key space that are announced again one by one
CHUNK_BYTES_GUESSED = 150.0  # what announcing one key costs before it was measured
ANNOUNCE_RATE_BPS = 20_000  # what announcing chunks again may cost, both directions
NODES_FOR_ALL_CHUNKS = 10_000  # in larger networks only chunks without a swarm record are announced
SWARM_CYCLE_S = 50 * 60.0
METADATA_CYCLE_S = 8 * 3600.0
HOLDERS_CHUNK = 8
HOLDERS_CHUNK_MAX = 12  # as long as there are few chunks: half of all nodes may die, and one in 4,096 keys is lost
COPIES_CHEAP = 800_000  # about 10 MB: below it more holders than 8 are worth their bytes
HOLDERS_FILE = 20
SPARSE_KEYS = 2  # a region with so few keys is not enumerated: each key looks for its own holders
WALKERS = 8
FIND_WALKERS = 32  # somebody waits: 5,000 keys within 10 s when half of the nodes are dead
WINDOW_TOTAL = 256  # datagrams in flight, all holders together
WINDOW_NODE_FIRST = 4
WINDOW_NODE_MAX = 32
PACE_PER_S = 4000.0  # datagrams, about 4.8 MB/s for one to two seconds per 100,000 keys; windows see to slower paths
PACE_BURST_S = 0.02  # so much of a second's datagrams may go at once
BACKOFF_MIN_S = 1.0  # of a holder without room
BACKOFF_MAX_S = 3600.0
HOLDERS_MAX = 20_000  # remembered; the others' records just expire
HOLDERS_ASKED = 3  # distinct holders whose answers are merged before a key counts as found
REANNOUNCE_PAUSE_S = 1.0  # between two announcements of everything because the network grew

# --- joining and leaving ---
BOOTSTRAP_NODES_MAX = 256  # from the command line and from links, kept to be asked again
BOOTSTRAP_ROUNDS = 2  # each asks for a second, half a second apart
FAR_LOOKUPS = 8  # random ids beside the own one, so that every bucket gets contacts
REJOIN_FIRST_S = 0.5
REJOIN_LAST_S = 60.0
RESOLVE_S = 5.0
REBIND_FIRST_S = 0.1
REBIND_LAST_S = 10.0
LEAVE_S = 0.8
LEAVE_ASKS_MAX = 4096  # holders that are told; the records of the others expire
SOCKET_BUFFER = 4 << 20  # bytes asked of the kernel each way
