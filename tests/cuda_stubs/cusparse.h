// Stands in for the toolkit's header of this name, as far as torch's headers need it to be parsed. Nothing links to it.
#pragma once

typedef struct cusparseContext* cusparseHandle_t;
typedef enum { CUSPARSE_STATUS_SUCCESS = 0 } cusparseStatus_t;

extern "C" const char* cusparseGetErrorString(cusparseStatus_t status);
