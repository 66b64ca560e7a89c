// Stands in for the toolkit's header of this name, as far as torch's headers need it to be parsed. Nothing links to it.
#pragma once

typedef struct cublasLtContext* cublasLtHandle_t;
