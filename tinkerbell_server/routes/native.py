"""The guide's API over plain HTTP. Thin: a body is parsed, `Service` does the work, the answer is encoded.

Bodies are msgpack (`Content-Type: application/msgpack`) or JSON (`application/json`); anything else is a 415. Answers
come in the format of `Accept` where it names one of the two, else in that of the request's body, else in JSON. In JSON,
bytes are base64. Every struct named here is in `tinkerbell_core.types`; fields at their default are left out.

    GET  /healthz                 {"status": "ok"|"starting"|"engine_down", "problem": str|null, "boot_id": str,
                                   "version": str, "engine": str, "base_model": str|null, "device": str|null,
                                   "dtype": str|null, "vocab_size": int|null, "max_length": int|null,
                                   "uploads": "off"|"trusted", "queue": int, "restarts": int}; always 200
    GET  /list_loss_functions     {"available_loss_functions": [name], "descriptions": {name: summary},
                                   "losses": [LossDescription], "plugins": [PluginDescription]}
    GET  /list_models             {"models": [ModelInfo]}
    POST /register_custom_loss    RegisterLossRequest → LossDescription, after the dry run; the call waits for it
    POST /create_model            CreateModelRequest  → Future of ModelInfo
    POST /forward                 ForwardRequest      → Future of ForwardOutput
    POST /forward_backward        ForwardRequest      → Future of ForwardOutput
    POST /optim_step              OptimStepRequest    → Future of OptimStepOutput
    POST /sample                  SampleRequest       → Future of SampleOutput
    POST /save                    SaveRequest         → Future of SaveOutput
    POST /load                    LoadRequest         → Future of LoadOutput
    POST /delete_model            DeleteModelRequest  → Future of DeleteModelOutput
    GET  /futures/{id}?wait=30    Future; waits up to `wait` seconds (at most 30) for it to finish

A `Future` comes back at once with status 200 and state queued, running, done (`result` is the struct above, as a map) or
failed (`problem` is a Problem); GET /futures answers 200 for a failed one too. `Idempotency-Key: <any string>` makes a
POST repeatable: the same key with the same body answers the first one's Future, with another body 409 Conflict.

A refusal is `{"problem": {"kind": ..., "message": ..., "traceback": ...}}` with the status of that kind of
`TinkerbellError` (422 unless it says otherwise; a body over the limit 413; a bug of ours 500). After an engine was lost
together with steps of a model, that model's next request is refused once with EngineLost (503); sending it again goes on.
"""
