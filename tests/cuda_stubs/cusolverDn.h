// Stands in for the toolkit's header of this name, as far as torch's headers need it to be parsed. Nothing links to it.
#pragma once

typedef struct cusolverDnContext* cusolverDnHandle_t;
typedef enum { CUSOLVER_STATUS_SUCCESS = 0, CUSOLVER_STATUS_INVALID_VALUE = 3 } cusolverStatus_t;
