# docker build -t collai . && docker run --rm -p 8888:8888 collai
FROM python:3.11-slim AS base
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*

FROM base
WORKDIR /collai
COPY . .
ARG TORCH_BACKEND=cpu
RUN make setup TORCH_BACKEND=$TORCH_BACKEND
EXPOSE 8888
CMD ["make", "lab", "LAB=--ip=0.0.0.0 --allow-root --no-browser"]
