/* Results of C functions that can fail. Zero is success; every failure is negative, so that
 * functions that return a count or an index can return a status in the same int. */
#ifndef FCAS_COMMON_STATUS_H
#define FCAS_COMMON_STATUS_H

typedef int fcas_status;

enum {
    FCAS_OK               = 0,
    FCAS_E_NOMEM          = -1,  /* allocation failed; nothing changed */
    FCAS_E_ARG            = -2,  /* an argument is out of its documented range */
    FCAS_E_FULL           = -3,  /* no room left; nothing changed */
    FCAS_E_NOTFOUND       = -4,
    FCAS_E_CORRUPT        = -5,  /* bytes contradict their format or their hash */
    FCAS_E_SYS            = -6,  /* a system call failed; errno is set */
    FCAS_E_VERSION        = -7,  /* format version unknown */
    FCAS_KERNEL_UNKNOWN   = -20, /* no kernel has this name */
    FCAS_KERNEL_NOT_BUILT = -21, /* the compiler could not build it */
    FCAS_KERNEL_NO_CPU    = -22  /* this CPU (or its operating system) lacks a feature that it needs */
};

#endif
