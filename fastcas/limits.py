"""Every limit and default in one place, each with its unit and its reason.

Sources: limits-and-faults §2.3, discovery §2.4, swarm §1 of the design notes; architecture §2, §9.
"""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

# --- files and manifests ---
CHUNK_SIZE_MIN = 16 * KIB  # below, request overhead dominates
CHUNK_SIZE_AUTO = 256 * KIB  # small chunks spread fastest
CHUNK_SIZE_MAX = 16 * MIB  # above, a chunk spreads too late and a receiver holds too much
CDC_AVERAGE_MIN = 64 * KIB  # chunks cut by content have a quarter of their average at least, four times it at most
CDC_AVERAGE_AUTO = MIB
CDC_AVERAGE_MAX = 4 * MIB
SEED_CHUNKS_MAX = 1_000_000  # chunks of --seed-from that are remembered, about 150 B each
CHUNKS_AUTO_MAX = 65_536  # auto doubles the chunk size until a file has at most this many
CHUNKS_MAX = 200_000  # refused beyond: a manifest stays below MANIFEST_SIZE_MAX
FILE_SIZE_MAX = 1 << 50  # bytes
MANIFEST_SIZE_MAX = 16 * MIB
COLLECTION_FILES_MAX = 1_000_000
COLLECTION_DIRS_MAX = 1_000_000
COLLECTION_SIZE_MAX = 512 * MIB  # bytes of a collection that we parse
NAME_BYTES_MAX = 255
PATH_BYTES_MAX = 4096
PARITY_M_MAX = 64
PARITY_TOTAL_MAX = 255  # k + m, the points of GF(2^8)
STRIPE_BYTES_MAX = GIB  # (k + m) * chunk size

# --- serving ---
REQUEST_LINE_MAX = 1024  # bytes; 414 beyond
REQUEST_HEADERS_MAX = 8192  # bytes, all of them; 431 beyond
REQUEST_FIELDS_MAX = 64
HEADER_DEADLINE_S = 10.0  # absolute, from accept or from the first byte of the next request
STALL_S = 30.0  # no progress while sending
MIN_RATE_BPS = 1024  # averaged over MIN_RATE_WINDOW_S
MIN_RATE_WINDOW_S = 60.0
IDLE_S = 60.0  # keep-alive
CONNECTIONS_PER_WORKER = 16_384
CONNECTIONS_PER_SOURCE = 64  # not for loopback and own prefixes
PER_SOURCE_MIN = 16  # of them per worker at least, because they do not spread evenly
UPLOAD_SLOTS = 8  # chunks sent at once to peers, per node; fewer than 8 starve an uplink at 40 ms
UPLINK_WAIT_S = 0.085  # "busy": more waits than the uplink sends in this time (WAIT_S in csrc/engine/slots.c)
UPLOAD_SLOTS_MIN = 4  # of them per worker at least
RESERVED_FDS = 64
LISTEN_BACKLOG = 1024
SWARM_WAIT_MS_MAX = 5000
SWARM_PEERS_MAX = 50
SEND_COPY_MAX = 8 * KIB  # one sendmsg from the mapped blob up to here, sendfile above (docs/DECISIONS.md)
DRAIN_S = 30.0
BLOBS_OPEN_MAX = 512  # blob windows that a worker keeps open and mapped (64 MiB of address space each)
PARKED_MAX = 4096  # requests per worker that wait for an answer from Python; more get 503
ACCEPT_PAUSE_S = 0.1  # after running out of file descriptors
EVENTS_PER_RUN = 512  # socket events before the event loop has its turn
TICK_S = 0.25  # deadlines and heartbeat of a worker
SWARM_POLL_MIN_S = 0.002  # a parked /swarm request looks for news after a tenth of the time since the last news,
SWARM_POLL_MAX_S = 0.02  # between these
NEXT_TRIAL_S = 5.0  # a taker of NEXT whose data port has not answered by then loses its marks
NEXT_TRIALS_PER_SOURCE = 8  # marks of such takers per source address
PEER_REPORT_S = 10.0  # a caller with port and id is reported to the agent at most this often per file
WORKERS_MAX = 256

# --- fetching ---
CONNECT_S = 5.0
FIRST_BYTE_S = 10.0
STALL_FETCH_S = 15.0
RESPONSE_HEADERS_MAX = 16 * KIB
CONNECTIONS_PER_PEER = 4
RECEIVE_MEMORY_MAX = 64 * MIB  # chunk buffers of one download, all connections together
FETCH_TIMEOUT_S = 30.0  # first peer and manifest
STALL_TIMEOUT_S = 30.0  # next to nothing from anybody
BAN_S = 24 * 3600.0
UNVERIFIED_WINDOW_CHUNKS = 64  # architecture §5.2, what a lie may cost
UNVERIFIED_WINDOW_BYTES = 64 * MIB

# --- processes ---
HEARTBEAT_S = 0.5
HUNG_AFTER_S = 10.0
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 5.0
CHILD_LINGER_S = 2.0  # children end this long after the supervisor is gone
CONTROL_MESSAGE_MAX = 64 * MIB
CHANNEL_MESSAGE_MAX = 64 * KIB

# --- verification ---
SCRUB_SLICE_S = 0.15  # one slice in the store's thread: other commands wait no longer than that, twice at most
SCRUB_SAVE_S = 5.0  # how much of a verification a kill can cost
SCRUB_EVERY_S = 7 * 24 * 3600.0  # a node's own: a bad sector is found before parity of the same age is likely gone, too
SCRUB_START_S = 5.0  # a node that starts first tells the network what it has
SCRUB_RATE_BPS = 20 * MIB  # of a node's own: a tenth of a slow disk, and 1 TB in 14 hours
VERIFY_RESUME_S = 24 * 3600.0  # an interrupted verification older than that says too little about today

# --- ports ---
DATA_PORT = 9000
DHT_PORT = 8468
