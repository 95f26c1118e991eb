"""
Proposals for the images in Parquet files or in the shards of a WebDataset, by Ray Data, on this
machine or a cluster: each row gets `boxes`, `scores` and `error`, and all go to Parquet files.

    python examples/propose_with_ray.py rows/ out/ --image image --workers 2
    python examples/propose_with_ray.py shards/ out/ --webdataset --image jpg --workers 8 --gpus 1
"""

import argparse

import ray

import oln_d2


def propose(args: argparse.Namespace) -> None:
    if args.webdataset:
        rows = ray.data.read_webdataset(args.input, decoder=None)  # as they are: not as arrays
    else:
        rows = ray.data.read_parquet(args.input)
    rows = rows.repartition(target_num_rows_per_block=args.rows)
    rows.map_batches(
        oln_d2.BatchProposer,
        fn_constructor_kwargs={
            "weights": args.weights,
            "image": args.image,
            "min_size": args.min_size,
            "top_k": args.top_k,
        },
        batch_format="pyarrow",  # which keeps the types of columns
        batch_size=min(64, args.rows),
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        num_cpus=args.cpus,
        num_gpus=args.gpus,
    ).write_parquet(args.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().partition(":\n")[0])
    parser.add_argument("input", help="a folder, or an address such as s3://bucket/rows")
    parser.add_argument("output", help="the same, for Parquet files")
    parser.add_argument("--webdataset", action="store_true", help="the input is .tar files")
    parser.add_argument("--image", default="image", help="the column, or ending, of the images")
    parser.add_argument("--weights", help="a checkpoint or an .onnx file, on all machines")
    parser.add_argument("--min-size", type=int, help="as of oln-d2 propose")
    parser.add_argument("--top-k", type=int, default=100, help="as of oln-d2 propose")
    parser.add_argument(
        "--rows", type=int, default=256, help="at once, which a worker that dies has to do again"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that have a model each")
    # Reading and writing need CPUs, too: beside workers that hold all, nothing would begin.
    parser.add_argument("--cpus", type=float, default=0.5, help="of each of them, for Ray's books")
    parser.add_argument("--gpus", type=float, default=0, help="of each of them")
    propose(parser.parse_args())
